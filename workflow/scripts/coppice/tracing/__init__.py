"""Where a number comes from: the records behind it, and whether they still agree. Reads records alone, no model."""

import json

from ..errors import CoppiceError, nearest
from . import checks, showing
from .chain import of_target

__all__ = ["trace"]


def trace(words, console, results="results", resources="resources", metric=None, stage=None, seed=None, **how):
    """Print what is behind a pair of model and config, or an arm of an ablation; returns whether all of it agrees.

    words: one path inside the results, or a model and a config; console: of rich; metric: a task, average_acc,
    ppl.<text> or recovered; stage: dense, pruned or finetuned; seed: of a further training; how: verify, to read the
    files on disk again, and as_json. Raises CoppiceError where there is nothing of that name.
    """
    chain = of_target(words, results, resources, seed)
    valid = showing.known_metrics(chain)
    if metric is not None and metric not in valid:
        raise CoppiceError(f"--metric {metric}: valid are {', '.join(valid)}{nearest(metric, valid)}")
    found, notes = checks.of_chain(chain, how.get("verify", False)), checks.notes(chain)
    rows = showing.values(chain, metric, stage)
    if how.get("as_json"):
        console.file.write(json.dumps(showing.as_dict(chain, found, notes, rows), indent=1) + "\n")
    else:
        showing.show(console, chain, found, notes, rows)
    return not any(check.agrees is False for check in found)
