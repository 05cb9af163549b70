"""Compare one model and config before and after fine-tuning, with the dense model for reference.

Reads records and samples alone, pairs them item by item, and writes `comparison.json` (everything) and
`comparison_report.txt` (for a terminal of 100 columns).
"""

import logging
from pathlib import Path

from . import records, statistics
from .comparison_text import render
from .errors import CoppiceError

logger = logging.getLogger("coppice.comparison")

STAGES = ("dense", "pruned", "finetuned")
DENSE, PRUNED, FINETUNED = range(3)


def compare(identity, evaluations, selection, finetuning, output, seed=0):
    """Compare the three evaluations of one model and config and write both files.

    identity: {model, config}; evaluations: stage -> folder of its evaluation; selection, finetuning: paths of the
    records of those stages; output: {record, report}. Raises CoppiceError where the stages were not evaluated alike.
    """
    clock = records.Clock()
    results = {stage: records.read(Path(evaluations[stage]) / "evaluation_results.json") for stage in STAGES}
    losses = {stage: records.read(Path(evaluations[stage]) / "ppl_results.json") for stage in STAGES}
    chosen, trained = records.read(selection), records.read(finetuning)
    _check_alike(results)
    tasks, parts = _tasks(results, evaluations, seed)
    record = identity | {
        "candidate": chosen["candidate"],
        "pruning": chosen["pruning"],
        "selection": {key: chosen[key] for key in ("criterion", "value", "runner_up", "metrics_from")},
        "parameters": {stage: results[stage]["parameters"] for stage in STAGES},
        "perplexity": {name: _perplexity(losses, name, seed) for name in results["dense"]["perplexity"]},
        "zero_shot": tasks,
        "average_acc": _average(parts),
        "extremes": _extremes(tasks),
        "cost": _cost(results, trained),
    }
    record["warnings"] = _warnings(record, trained)
    inputs = {stage: results[stage]["provenance"]["fingerprints"] for stage in STAGES}
    record["provenance"] = clock.provenance({"level": statistics.LEVEL}, seed, **inputs)
    records.write(output["record"], record)
    with records.atomic(output["report"]) as file:
        file.write(render(record))
    logger.info("%s", output["report"])


def _check_alike(results):
    """Numbers of different protocols, tasks or data cannot be compared."""
    first = results["dense"]
    for stage, result in results.items():
        for part in ("perplexity", "zero_shot"):
            if list(result[part]) != list(first[part]):
                raise CoppiceError(f"{stage} was evaluated on other {part} data than dense: run the evaluations again")
        for name, text in result["perplexity"].items():
            if text["protocol"] != first["perplexity"][name]["protocol"]:
                raise CoppiceError(f"perplexity on {name}: {stage} and dense were measured under different protocols")
        if result["provenance"]["fingerprints"]["datasets"] != first["provenance"]["fingerprints"]["datasets"]:
            raise CoppiceError(f"{stage} was evaluated on other rows than dense: run the evaluations again")


def _perplexity(losses, name, seed):
    """The three perplexities on one text, their change with interval, and what was recovered."""
    texts = [losses[stage]["perplexity"][name] for stage in STAGES]
    windows = [[window["nll_per_token"] for window in text["window_losses"]] for text in texts]
    tokens = [window["tokens"] for window in texts[0]["window_losses"]]
    if len({len(row) for row in windows}) != 1:
        raise CoppiceError(f"perplexity on {name}: the stages have different numbers of windows")
    import numpy

    paired = statistics.paired_means(windows, seed, tokens).map(numpy.exp)
    change = statistics.change(paired, PRUNED, FINETUNED)
    return {
        **{stage: text["value"] for stage, text in zip(STAGES, texts, strict=True)},
        "protocol": texts[0]["protocol"],
        "tokens": texts[0]["tokens"],
        "change": change,
        "change_percent": 100 * change["value"] / texts[PRUNED]["value"],
        "lost": statistics.change(paired, DENSE, PRUNED),
        "recovered": statistics.recovered_fraction(paired, DENSE, PRUNED, FINETUNED, higher_is_better=False),
        "verdict": statistics.verdict_of_interval(change["interval"], higher_is_better=False),
    }


def _tasks(results, evaluations, seed):
    """Per task: accuracies, change with interval and tests; and the bootstrap of each, for the mean."""
    import pandas

    tasks, parts = {}, []
    for name, result in results["dense"]["zero_shot"].items():
        frames = [pandas.read_parquet(Path(evaluations[stage]) / "samples" / f"{name}.parquet") for stage in STAGES]
        frames = [frame.set_index("doc_id").sort_index() for frame in frames]
        if any(list(frame["doc_hash"]) != list(frames[0]["doc_hash"]) for frame in frames):
            raise CoppiceError(f"task {name}: the stages were scored on different items: run the evaluations again")
        correct = [frame["correct"].to_numpy(dtype=float) for frame in frames]
        paired = statistics.paired_means(correct, seed)
        parts.append(paired)
        tasks[name] = {
            "metric": result["metric"],
            "n": len(correct[0]),
            **{stage: float(value) for stage, value in zip(STAGES, paired.values, strict=True)},
            "change": statistics.change(paired, PRUNED, FINETUNED),
            "lost": statistics.change(paired, DENSE, PRUNED),
            **statistics.mcnemar(correct[PRUNED] > 0.5, correct[FINETUNED] > 0.5),
        }
    for task, p in zip(tasks.values(), statistics.holm([task["p"] for task in tasks.values()]), strict=True):
        task["p_holm"] = p
        task["verdict"] = statistics.verdict(task["change"]["value"], p)
    return tasks, parts


def _average(parts):
    """The unweighted mean over tasks of the three stages, its change and what was recovered; None without tasks."""
    if not parts:
        return None
    paired = statistics.mean_of(parts)
    change = statistics.change(paired, PRUNED, FINETUNED)
    return {
        **{stage: float(value) for stage, value in zip(STAGES, paired.values, strict=True)},
        "change": change,
        "lost": statistics.change(paired, DENSE, PRUNED),
        "recovered": statistics.recovered_fraction(paired, DENSE, PRUNED, FINETUNED),
        "verdict": statistics.verdict_of_interval(change["interval"]),
    }


def _extremes(tasks):
    """The tasks with the largest and the smallest change, signs kept."""
    if not tasks:
        return None
    ordered = sorted(tasks, key=lambda name: tasks[name]["change"]["value"])
    return {"largest": ordered[-1], "smallest": ordered[0]}


def _cost(results, trained):
    """Seconds, tokens and memory of training and of the three evaluations."""
    return {
        "training_seconds": trained["seconds"],
        "training_tokens": trained["tokens_seen"],
        "training_peak_memory_bytes": trained["provenance"]["peak_memory_bytes"],
        "trainable_parameters": trained["trainable_parameters"],
        "evaluation_seconds": {stage: results[stage]["provenance"]["seconds"] for stage in STAGES},
    }


def _warnings(record, trained):
    """What a reader has to know before trusting or quoting the numbers."""
    found = []
    first, best = trained.get("first_validation_loss"), trained.get("validation_loss")
    if first is not None and best >= first:
        found.append(f"the validation loss did not fall (first {first:.4f}, best {best:.4f})")
    for name, text in record["perplexity"].items():
        if text["verdict"] == "worse":
            found.append(f"fine-tuning made the perplexity on {name} worse")
        if "requested_seq_len" in text["protocol"]:
            facts = text["protocol"]
            found.append(
                f"perplexity on {name}: windows of {facts['seq_len']}, the model's context, "
                f"not {facts['requested_seq_len']}: do not compare it with other models' published values"
            )
    return found
