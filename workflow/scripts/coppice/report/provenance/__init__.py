"""Where a number comes from: the records behind it, and whether they still agree. Reads records alone, no model."""

import json

from coppice.core.errors import CoppiceError
from coppice.study import layout

from . import agreement, display, whole_study
from .chain import of_target, resources_of

__all__ = ["trace"]


def trace(words, console, results="results", resources=None, metric=None, stage=None, seed=None, **how):
    """Print what is behind a pair of model and config, an arm, or a whole study; returns whether all of it agrees.

    words: one path inside the results (that folder, or its report, for the whole study), or a model and a config;
    resources: by default those that the study's records name; console: of rich; metric: a task, average_acc, ppl.<text>
    or recovered; stage: dense, pruned or finetuned; seed: of a further training; how: verify, to read the files on disk
    again, and as_json. Raises CoppiceError where there is nothing of that name.
    """
    if len(words) == 1 and (study := layout.results_above(words[0])):
        if seed is not None:
            raise CoppiceError("--seed goes with a model and config, or with a file of theirs, not with a whole study")
        return whole_study.trace(study, resources or resources_of(study), console, metric, stage, **how)
    chain = of_target(words, results, resources, seed)
    display.check_metric(metric, display.known_metrics(chain))
    found, notes = agreement.of_chain(chain, how.get("verify", False)), agreement.notes(chain)
    rows = display.values(chain, metric, stage)
    if how.get("as_json"):
        console.file.write(json.dumps(display.as_dict(chain, found, notes, rows), indent=1) + "\n")
    else:
        display.show(console, chain, found, notes, rows)
    return not any(check.agrees is False for check in found)
