"""Select the best candidate of a model by a named criterion, on data that the reports never use.

A criterion is {metric, mode}: metric `average_acc`, `ppl.<dataset>`, a task, or a column of the user's table.
"""

import logging
import math
import os
from pathlib import Path

from . import candidates, records
from .errors import CoppiceError

logger = logging.getLogger("coppice.selection")


def metrics_of(evaluation=None, given=None):
    """All metrics of a candidate by name: of its evaluation record (a dict), overridden by its table's columns.

    A given `acc` stands for average_acc, a given `ppl` for any perplexity that a criterion asks for.
    """
    metrics = {}
    if evaluation:
        metrics["average_acc"] = evaluation["average_acc"]
        metrics |= {f"ppl.{name}": result["value"] for name, result in evaluation["perplexity"].items()}
        scored = evaluation["zero_shot"] | evaluation.get("other_tasks", {})
        metrics |= {name: result["value"] for name, result in scored.items()}
    for name, value in (given or {}).items():
        metrics["average_acc" if name == "acc" else name] = value
    return {name: value for name, value in metrics.items() if value is not None}


def needs_scoring(candidate, criteria):
    """Whether a candidate (grid point, or row of the table) lacks a metric that one of the `criteria` asks for."""
    if "path" not in candidate:
        return True
    given = metrics_of(given=candidate["given"])
    return any(value_of(given, criterion["metric"]) is None for criterion in criteria.values())


def value_of(metrics, metric):
    """The value of `metric` among a candidate's metrics, or None; a table's `ppl` serves for every perplexity."""
    if metric in metrics:
        return metrics[metric]
    return metrics.get("ppl") if metric.startswith("ppl.") else None


def rank(scored, metric, mode):
    """Names of candidates from best to worst by `metric`; ties go to fewer parameters, then to the name.

    scored: name -> {metrics, parameters}. Raises CoppiceError where a candidate lacks the metric.
    """
    sign = -1 if mode == "max" else 1

    def key(name):
        value = value_of(scored[name]["metrics"], metric)
        if value is None or not math.isfinite(value):
            raise CoppiceError(f"candidate {name} has no usable value for the metric {metric} ({value})")
        return sign * value, scored[name]["parameters"] or math.inf, name

    return sorted(scored, key=key)


def read_candidates(folders):
    """name -> {folder, pruning record, metrics, parameters, given} from candidate folders and evaluation records.

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
            "given": pruning.get("given") or {},
            "metrics": metrics_of(evaluation, pruning.get("given")),
            "parameters": parameters,
        }
    return scored


def select_best(identity, criterion, folders, output):
    """Choose the best of the candidates by `criterion` and write `selection_info.json` and the linked checkpoint.

    identity: {model, config}; criterion: {metric, mode, split}; folders as for `read_candidates`.
    """
    scored = read_candidates(folders)
    metric, mode = criterion["metric"], criterion["mode"]
    order = rank(scored, metric, mode)
    best = scored[order[0]]
    value = value_of(best["metrics"], metric)
    output = Path(output)
    candidates.link(best["folder"], output)
    info = identity | {
        "criterion": criterion,
        "candidate": order[0],
        "value": value,
        "metrics": best["metrics"],
        "metrics_from": "the user's table" if best["given"] else "scored here",
        "parameters": best["parameters"],
        "runner_up": _runner_up(scored, order, metric, value),
        "candidates_considered": order,
        "source_path": os.path.relpath(best["folder"]),
        "weights_fingerprint": best["pruning"]["weights_fingerprint"],
        "pruning": best["pruning"]["settings"],
    }
    records.write(output / "selection_info.json", info)
    logger.info("%s %s: %s (%s %.4g)", identity["model"], identity["config"], order[0], metric, value)


def _runner_up(scored, order, metric, value):
    if len(order) < 2:
        return None
    second = value_of(scored[order[1]]["metrics"], metric)
    return {"candidate": order[1], "value": second, "margin": abs(value - second)}


def summarize(folders_by_model, selections, table, page):
    """Write `candidates.tsv` (every candidate with its metrics) and `SUMMARY.md` (a table a model, the chosen ones).

    folders_by_model: model -> folders as for `read_candidates`; selections: paths of selection_info.json.
    """
    import pandas

    chosen = [records.read(path) for path in selections]
    rows = []
    for model, folders in folders_by_model.items():
        for name, entry in read_candidates(folders).items():
            configs = [info["config"] for info in chosen if (info["model"], info["candidate"]) == (model, name)]
            rows.append(
                {"model": model, "candidate": name, "parameters": entry["parameters"]}
                | entry["metrics"]
                | {"chosen_as": ",".join(configs)}
            )
    frame = pandas.DataFrame(rows)
    frame.insert(len(frame.columns) - 1, "chosen_as", frame.pop("chosen_as"))
    with records.atomic(table) as file:
        frame.to_csv(file, sep="\t", index=False)
    with records.atomic(page) as file:
        file.write(_page(frame, chosen))


def _page(frame, chosen):
    """The Markdown of SUMMARY.md."""
    lines = ["# Candidates and choices", ""]
    for model, rows in frame.groupby("model", sort=False):
        shown = rows.dropna(axis="columns", how="all").drop(columns="model")
        lines += [f"## {model}", "", _markdown(shown), ""]
        for info in (info for info in chosen if info["model"] == model):
            second = info["runner_up"]
            after = f"; next {second['candidate']}, behind by {second['margin']:.4g}" if second else ""
            metric = f"{info['criterion']['mode']} {info['criterion']['metric']}"
            lines.append(f"- **{info['config']}** ({metric}): `{info['candidate']}` with {info['value']:.4g}{after}")
        lines.append("")
    return "\n".join(lines)


def _markdown(frame):
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    head = list(frame.columns)
    rows = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value):
    if isinstance(value, float):
        return "" if math.isnan(value) else (f"{value:.0f}" if value.is_integer() and value > 1000 else f"{value:.4g}")
    return str(value).replace("|", "\\|")
