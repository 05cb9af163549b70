"""The choice of one config: the best candidate by its criterion, the runner-up, and whether the margin is noise."""

import contextlib
import logging
import os
from pathlib import Path

from coppice.core import records

from ..prune import candidates
from . import ranking

logger = logging.getLogger("coppice.selection")


def read_candidates(folders):
    """name -> {folder, pruning (record), evaluation (folder or None), tasks, metrics, parameters, given}.

    folders: name -> (path of pruning.json, path of evaluation_results.json or None).
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
            "tasks": list(evaluation["zero_shot"]) if evaluation else [],
            "given": pruning.get("given") or {},
            "metrics": ranking.metrics_of(evaluation, pruning.get("given")),
            "parameters": parameters,
        }
    return scored


def select_best(identity, criterion, folders, output, seed=0):
    """Choose the best of the candidates by `criterion` and write `selection_info.json` and the linked checkpoint.

    identity: {model, config}; criterion: as resolved by `settings`, with `split`; folders as for `read_candidates`.
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
        "warnings": _warnings(origin),
        "parameters": best["parameters"],
        "runner_up": _runner_up(scored, order, criterion, seed),
        "candidates_considered": [considered for considered, _ in order],
        "passed_over": outside,
        "source_path": os.path.relpath(best["folder"]),
        "weights_fingerprint": best["pruning"]["weights_fingerprint"],
        "pruning": best["pruning"]["settings"],
        # no times: a choice that is made again alike is the same file, after which nothing has to run again
        "provenance": {"seed": seed, "versions": records.versions()},
    }
    records.write(output / "selection_info.json", info)
    logger.info("%s %s: %s (%s: %.4g)", identity["model"], identity["config"], name, criterion["words"], value)


def _origin(entry, criterion):
    """Where the numbers come from that a candidate is ranked by."""
    given = all(ranking.is_given(entry["given"], metric) for metric in ranking.asked(criterion))
    return "the user's table" if given else "scored here"


def _warnings(origin):
    if len(set(origin.values())) == 1:
        return []
    own = [name for name, where in origin.items() if where != "scored here"]
    return [
        f"numbers of the user's own ({', '.join(own)}) stand beside candidates that were scored here: they compare "
        "only if they were measured alike"
    ]


def trained(paths):
    """config -> candidate of the configs that were trained by themselves, not taken over, for what they chose.

    paths: config -> (selection_info.json, finetuning_config.json), which need not be there.
    """
    found = {}
    for config, (selected, finetuned) in paths.items():
        try:
            choice, training = records.read(selected), records.read(finetuned)
        except records.RecordError:
            continue
        print_ = training["provenance"]["fingerprints"]["weights"]
        if not training.get("reused_from") and print_ == choice["weights_fingerprint"]:
            found[config] = choice["candidate"]
    return found


def config_to_train(path, candidate, alike, before, decide=True):
    """Which of the configs `alike`, which all chose `candidate`, is trained; the others take its results over.

    The one that was decided on earlier (in the record `path`), else one that is trained already (`before`), else the
    first. Where not to `decide`, as in a cluster's job, whose run has decided, nothing is written.
    """
    known = {}
    with contextlib.suppress(records.RecordError):
        known = records.read(path)["owners"]
    if known.get(candidate) in alike:
        return known[candidate]
    found = next((config for config in alike if before.get(config) == candidate), alike[0])
    if decide and len(alike) > 1:
        records.write(path, {"owners": known | {candidate: found}})
    return found


def chosen(path):
    """The name of the candidate in a `selection_info.json`."""
    return records.read(path)["candidate"]


def _runner_up(scored, order, criterion, seed):
    """The second best: {candidate, value, margin, interval, within_noise}; None where there is one candidate."""
    if len(order) < 2:
        return None
    (best, value), (name, second) = order[:2]
    found = {"candidate": name, "value": second, "margin": abs(value - second)}
    bounds = None
    if not criterion["pareto"]:
        from . import margins  # numpy, of which parsing the workflow has no need

        bounds = margins.interval(scored[best], scored[name], criterion["metric"], seed)
    return found | {"interval": bounds, "within_noise": None if bounds is None else bounds[0] <= 0 <= bounds[1]}
