"""Choose a config's candidate by its criterion, with the runner-up and whether the margin is within noise."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.render import formatting
from coppice.stats.metrics import found_in

from ..prune import candidates
from . import ranking

Folders = Mapping[str, tuple[PathLike, PathLike | None]]  # candidate -> (pruning.json, evaluation_results.json or None)

logger = logging.getLogger("coppice.selection")


def read_candidates(folders: Folders) -> dict[str, ranking.Entry]:
    """Read the records of candidates.

    Args:
        folders: name -> (path of pruning.json, path of evaluation_results.json or None).

    Returns:
        name -> {folder, pruning (record), evaluation (folder or None), measured (key -> `Metric` in the evaluation),
        metrics (key -> value), parameters, sparsity (as from `sparsity.measure`, or None), warnings (of
        the evaluation), given}.
    """
    scored = {}
    for name, (pruning_path, evaluation_path) in folders.items():
        pruning = records.read(pruning_path)
        evaluation = records.read(evaluation_path) if evaluation_path else None
        parameters = evaluation["parameters"] if evaluation else pruning.get("parameters")
        if isinstance(parameters, dict):
            parameters = parameters["after"]
        scored[name] = {
            "folder": str(Path(pruning_path).parent),
            "pruning": pruning,
            "evaluation": str(Path(evaluation_path).parent) if evaluation_path else None,
            "measured": {metric.key: metric for metric in found_in(evaluation or {})},
            "given": pruning.get("given") or {},
            "metrics": ranking.metrics_of(evaluation, pruning.get("given")),
            "parameters": parameters,
            "warnings": (evaluation or {}).get("warnings") or [],
            "sparsity": (evaluation or pruning).get("sparsity"),
        }
    return scored


def select_best(identity: Record, criterion: Record, folders: Folders, output: PathLike, seed: int = 0) -> None:
    """Choose the best candidate, write `selection_info.json` and link the checkpoint beside it.

    Args:
        identity: {model, config}.
        criterion: as resolved by `settings`, with `split`.
        folders: as for `read_candidates`.
        output: folder to write.
        seed: the study's, for the record.
    """
    scored = read_candidates(folders)
    left, outside = ranking.within_bounds(scored, criterion["where"])
    order = ranking.rank({name: scored[name] for name in left}, criterion)
    name, value = order[0]
    best = scored[name]
    output = Path(output)
    origin = {considered: _origin(scored[considered], criterion) for considered, _ in order}
    candidates.link(best["folder"], output)
    info = identity | {
        "criterion": criterion,
        "candidate": name,
        "value": value,
        "metrics": best["metrics"],
        "metrics_from": origin[name],
        "warnings": _warnings(origin) + formatting.warned({n: scored[n]["warnings"] for n, _ in order}),
        "parameters": best["parameters"],
        "runner_up": _runner_up(scored, order, criterion),
        "candidates_considered": [considered for considered, _ in order],
        "passed_over": outside,
        "source_path": os.path.relpath(best["folder"]),
        "weights_fingerprint": best["pruning"]["weights_fingerprint"],
        "pruning": best["pruning"]["settings"],
        # Without times, a rerun that makes the same choice writes the same file, and nothing reruns after it.
        "provenance": {"seed": seed, "versions": records.versions()},
    }
    records.write(output / "selection_info.json", info)
    logger.info("%s %s: %s (%s: %.4g)", identity["model"], identity["config"], name, criterion["words"], value)


def _origin(entry: ranking.Entry, criterion: Record) -> str:
    """Return the origin of the numbers that rank a candidate: the user's table or scoring here."""
    given = all(ranking.is_given(entry["given"], metric) for metric in ranking.needed_metrics(criterion))
    return "the user's table" if given else "scored here"


def _warnings(origin: Mapping[str, str]) -> list[str]:
    if len(set(origin.values())) == 1:
        return []
    own = [name for name, where in origin.items() if where != "scored here"]
    return [
        f"numbers of the user's own ({', '.join(own)}) stand beside candidates that were scored here: they compare "
        "only if they were measured alike"
    ]


def chosen(path: PathLike) -> str:
    """Return the name of the candidate in a `selection_info.json`."""
    return records.read(path)["candidate"]


def weights_of(path: PathLike) -> str | None:
    """Return the fingerprint of a candidate's weights from its `pruning.json`; None if it cannot be read."""
    try:
        return records.read(path)["weights_fingerprint"]
    except (records.RecordError, KeyError):
        return None


def _runner_up(
    scored: Mapping[str, ranking.Entry], order: Sequence[tuple[str, float]], criterion: Record
) -> Record | None:
    """Return the second best as {candidate, value, margin, interval, resampled, within_noise}, or None without one."""
    if len(order) < 2:
        return None
    (best, value), (name, second) = order[:2]
    found = {"candidate": name, "value": second, "margin": abs(value - second)}
    margin = {"interval": None, "resampled": None}
    if not criterion["pareto"]:
        from . import margins  # imports numpy, which parsing the workflow does not need

        margin = margins.of(scored[best], scored[name], criterion["metric"])
    bounds = margin["interval"]
    return found | margin | {"within_noise": None if bounds is None else bounds[0] <= 0 <= bounds[1]}
