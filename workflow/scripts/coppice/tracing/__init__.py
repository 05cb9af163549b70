"""Where a number comes from: the records behind it, and whether they still agree. Reads records alone, no model."""

import json

from . import checks, showing, whole
from .chain import of_target

__all__ = ["trace"]


def trace(words, console, results="results", resources="resources", metric=None, stage=None, seed=None, **how):
    """Print what is behind a pair of model and config, an arm, or a whole study; returns whether all of it agrees.

    words: one path inside the results (that folder, or its report, for the whole study), or a model and a config;
    console: of rich; metric: a task, average_acc, ppl.<text> or recovered; stage: dense, pruned or finetuned; seed: of
    a further training; how: verify, to read the files on disk again, and as_json. Raises CoppiceError where there is
    nothing of that name.
    """
    if study := whole.results_of(words):
        return whole.trace(study, resources, console, metric, stage, **how)
    chain = of_target(words, results, resources, seed)
    showing.check_metric(metric, showing.known_metrics(chain))
    found, notes = checks.of_chain(chain, how.get("verify", False)), checks.notes(chain)
    rows = showing.values(chain, metric, stage)
    if how.get("as_json"):
        console.file.write(json.dumps(showing.as_dict(chain, found, notes, rows), indent=1) + "\n")
    else:
        showing.show(console, chain, found, notes, rows)
    return not any(check.agrees is False for check in found)
