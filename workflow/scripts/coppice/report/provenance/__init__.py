"""Trace a number to the records behind it and check that they still agree. Reads records only, never a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.core.errors import CoppiceError
from coppice.study import layout

from . import agreement, display, whole_study
from .chain import of_target, resources_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["trace"]


def trace(
    words: Sequence[str],
    console: Console,
    results: PathLike = "results",
    resources: PathLike | None = None,
    metric: str | None = None,
    stage: str | None = None,
    seed: int | None = None,
    **how: bool,
) -> bool:
    """Print the records behind a model and config, an ablation's arm or a whole study, and whether they agree.

    Args:
        words: one path inside the results (for the whole study the results folder or its report), or a model and a
            config.
        console: a `rich` console.
        results: the results folder, used with a model and a config.
        resources: the folder of models and data; by default the one that the study's records name.
        metric: show this metric only: the key of one, recovered or validation_loss.
        stage: show this stage only: dense, pruned or finetuned.
        seed: the seed of a repeated training.
        how: `verify` reads and hashes the files on disk again, `as_json` prints JSON.

    Returns:
        False if any check fails, else True.

    Raises:
        CoppiceError: if nothing has that name.
    """
    if len(words) == 1 and (study := layout.results_above(words[0])):
        if seed is not None:
            raise CoppiceError("--seed does not apply to a whole study; name a model and config, or one of their files")
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
