"""Compare one model and config before and after fine-tuning, with the dense model as the reference.

Reads only records and samples of evaluations, pairs them item by item, and writes `comparison.json` (everything) and
`comparison_report.txt` (for a terminal of 100 columns). Nothing is evaluated here.
"""

import logging
from pathlib import Path

import numpy

from coppice.core import records
from coppice.core.errors import CoppiceError
from coppice.render import formatting
from coppice.stats import paired_stats, stored_samples

from .report_text import render

logger = logging.getLogger("coppice.comparison")

STAGES = ("dense", "pruned", "finetuned")
DENSE, PRUNED, FINETUNED = range(3)
FEW_WINDOWS = 20  # bootstrap intervals over fewer windows of text are not reliable


def compare(identity, evaluations, selection, finetuning, output, seed=0, seeds=None):
    """Compare the three evaluations of one model and config, and write both files.

    Args:
        identity: {model, config}.
        evaluations: stage -> folder of its evaluation.
        selection, finetuning: paths of the records of these stages.
        output: {record, report}, the files to write.
        seed: of the bootstrap.
        seeds: seed -> folder of the evaluation of the model fine-tuned with it, including the first seed; None if the
            training was not repeated.

    Raises:
        CoppiceError: The stages were evaluated differently, or an evaluation is of another model than expected.
    """
    clock = records.Clock()
    files = {stage: _record_of(evaluations[stage]) for stage in STAGES}
    results = {stage: records.read(file) for stage, file in files.items()}
    folders = [evaluations[stage] for stage in STAGES]
    chosen, trained = records.read(selection), records.read(finetuning)
    check_alike(results, files)
    files |= {"selection": Path(selection), "fine-tuning": Path(finetuning)}
    _check_models(identity, results, chosen, trained, files)
    tasks, parts = _tasks(results, folders, seed)
    record = identity | {
        "candidate": chosen["candidate"],
        "reused_from": results["finetuned"].get("reused_from"),
        "pruning": chosen["pruning"],
        "selection": {key: chosen[key] for key in ("criterion", "value", "runner_up", "metrics_from")},
        "parameters": {stage: results[stage]["parameters"] for stage in STAGES},
        "perplexity": {name: _perplexity(results, folders, name, seed) for name in results["dense"]["perplexity"]},
        "zero_shot": tasks,
        "average_acc": _average(parts),
        "extremes": _extremes(tasks),
        "cost": _cost(results, trained),
        "generations": _generations(results),
    }
    if seeds:
        record["seeds"] = _over_seeds(results, files["dense"], seeds)
    record["warnings"] = _warnings(record, results, trained)
    inputs = {stage: results[stage]["provenance"]["fingerprints"] for stage in STAGES}
    record["provenance"] = clock.provenance({"level": paired_stats.LEVEL}, seed, **inputs)
    records.write(output["record"], record)
    with records.atomic(output["report"]) as file:
        file.write(render(record))
    logger.info("%s", output["report"])


def _record_of(folder):
    """Return the path of the record of the evaluation in `folder`."""
    return Path(folder) / "evaluation_results.json"


def _again(*files):
    """Return the remedy that error messages end with: to make these records again."""
    return f"delete {formatting.listed(files)} and run snakemake again"


def check_alike(results, files):
    """Raise CoppiceError if evaluations differ in protocol, tasks or data.

    Args:
        results: stage -> record, with one for the dense model.
        files: stage -> path of that record, for the messages.
    """
    first = results["dense"]
    for stage, result in results.items():
        where = f"{files[stage]}: "
        # Nothing says which of the two evaluations is the outdated one. Making both again is cheap, because an
        # evaluation takes the parts that are still valid from its `.parts`.
        again = f"{_again(files[stage], files['dense'])}, which reuses the parts that are still valid"
        for part in ("perplexity", "zero_shot"):
            if list(result[part]) != list(first[part]):
                raise CoppiceError(
                    f"{where}the {stage} and the dense model were evaluated on different {part} data; {again}"
                )
        for name, text in result["perplexity"].items():
            if text["protocol"] != first["perplexity"][name]["protocol"]:
                raise CoppiceError(
                    f"{where}perplexity on {name}: the {stage} and the dense model were measured under different "
                    f"protocols; {again}"
                )
        for name, task in result["zero_shot"].items():
            for key in ("metric", "version", "num_fewshot", "chat_template"):
                ours, theirs = task.get(key), first["zero_shot"][name].get(key)
                if ours != theirs:
                    raise CoppiceError(
                        f"{where}task {name}: the {stage} model was scored with {key} {ours}, the dense one with "
                        f"{theirs}; {again}"
                    )
        if result["provenance"]["fingerprints"]["datasets"] != first["provenance"]["fingerprints"]["datasets"]:
            raise CoppiceError(f"{where}the {stage} and the dense model were evaluated on different rows; {again}")


def _check_models(identity, results, chosen, trained, files):
    """Raise CoppiceError if a record is of another model or config, or of other weights or another adapter.

    files: the paths of all these records, for the messages.
    """
    for what, record in {**results, "selection": chosen, "fine-tuning": trained}.items():
        other = [key for key in ("model", "config") if record.get(key) not in (None, identity[key])]
        if other:
            raise CoppiceError(
                f"{files[what]}: the {what} record belongs to {other[0]} {record[other[0]]} instead of "
                f"{identity[other[0]]}; {_again(files[what])}"
            )
    prints = {stage: result["provenance"]["fingerprints"] for stage, result in results.items()}
    weights = {stage: one["weights"] for stage, one in prints.items()}
    if weights["pruned"] == weights["dense"]:
        raise CoppiceError(
            f"{files['pruned']}: the model evaluated as pruned has the dense model's weights; check that candidate "
            f"{chosen['candidate']} is not the dense model, then {_again(files['pruned'])}"
        )
    for what, record, found in (
        ("evaluated as pruned", "pruned", weights["pruned"]),
        ("evaluated as finetuned", "finetuned", weights["finetuned"]),
        ("fine-tuned", "fine-tuning", trained["provenance"]["fingerprints"]["weights"]),
    ):
        if found != chosen["weights_fingerprint"]:
            raise CoppiceError(
                f"{files[record]}: the checkpoint that was {what} is not the selected one ({chosen['candidate']}); "
                f"{_again(files[record])}"
            )
    if not prints["finetuned"]["adapter"]:
        raise CoppiceError(
            f"{files['finetuned']}: the fine-tuned model was evaluated without its adapter; "
            f"{_again(files['finetuned'])}"
        )
    if trained.get("trained_fingerprint") not in (None, prints["finetuned"]["adapter"]):
        raise CoppiceError(
            f"{files['finetuned']}: the fine-tuned model was evaluated with another adapter than the trained one "
            f"({files['fine-tuning']}); {_again(files['finetuned'])}"
        )


def _perplexity(results, folders, name, seed):
    """Return the three perplexities on one text, their change with its interval, and the recovered fraction."""
    texts = [results[stage]["perplexity"][name] for stage in STAGES]
    windows, tokens = stored_samples.window_losses(folders, name, _again(*map(_record_of, folders)))
    # windows differ in length: their mean losses are weighted by tokens, as in the perplexity of the whole text
    paired = paired_stats.paired_means(windows, seed, tokens).map(numpy.exp)
    change = paired_stats.change(paired, PRUNED, FINETUNED)
    return {
        **{stage: text["value"] for stage, text in zip(STAGES, texts, strict=True)},
        "protocol": texts[0]["protocol"],
        "tokens": texts[0]["tokens"],
        "windows": len(tokens),
        "change": change,
        "change_percent": 100 * change["value"] / texts[PRUNED]["value"],
        "lost": paired_stats.change(paired, DENSE, PRUNED),
        "recovered": paired_stats.recovered_fraction(paired, DENSE, PRUNED, FINETUNED, higher_is_better=False),
        "verdict": paired_stats.verdict_of_interval(change["interval"], higher_is_better=False),
    }


def _tasks(results, folders, seed):
    """Return task -> accuracies, change with interval and tests; and the bootstrap of each task, for the mean."""
    tasks, parts = {}, []
    for name, result in results["dense"]["zero_shot"].items():
        correct = stored_samples.right_and_wrong(folders, name, _again(*map(_record_of, folders)))
        paired = paired_stats.paired_means(correct, seed)
        parts.append(paired)
        tasks[name] = {
            "metric": result["metric"],
            "n": len(correct[0]),
            **{stage: float(value) for stage, value in zip(STAGES, paired.values, strict=True)},
            "change": paired_stats.change(paired, PRUNED, FINETUNED),
            "lost": paired_stats.change(paired, DENSE, PRUNED),
            **paired_stats.mcnemar(correct[PRUNED] > 0.5, correct[FINETUNED] > 0.5),
        }
    # with several tasks, some p-value is small by chance, so the verdict uses the corrected one
    for task, p in zip(tasks.values(), paired_stats.holm([task["p"] for task in tasks.values()]), strict=True):
        task["p_holm"] = p
        task["verdict"] = paired_stats.verdict(task["change"]["value"], p)
    return tasks, parts


def _average(parts):
    """Return the unweighted mean over tasks per stage, its change and the recovered fraction; None without tasks."""
    if not parts:
        return None
    paired = paired_stats.mean_of(parts)
    change = paired_stats.change(paired, PRUNED, FINETUNED)
    return {
        **{stage: float(value) for stage, value in zip(STAGES, paired.values, strict=True)},
        "change": change,
        "lost": paired_stats.change(paired, DENSE, PRUNED),
        "recovered": paired_stats.recovered_fraction(paired, DENSE, PRUNED, FINETUNED),
        "verdict": paired_stats.verdict_of_interval(change["interval"]),
    }


def _extremes(tasks):
    """Return the tasks with the largest and the smallest signed change."""
    if not tasks:
        return None
    ordered = sorted(tasks, key=lambda name: tasks[name]["change"]["value"])
    return {"largest": ordered[-1], "smallest": ordered[0]}


def _generations(results):
    """Return [{prompt, dense, pruned, finetuned}] for the prompts that all three models answered."""
    answers = {
        stage: {one["prompt"]: one["text"] for one in result.get("generations") or []}
        for stage, result in results.items()
    }
    return [
        {"prompt": prompt} | {stage: texts[prompt] for stage, texts in answers.items()}
        for prompt in answers["dense"]
        if all(prompt in texts for texts in answers.values())
    ]


def _over_seeds(results, dense, folders):
    """Return mean and spread of every metric over repeated trainings, with the seed as a random factor.

    The result is {seeds, metrics}. `metrics` maps each metric to `paired_stats.over_seeds` of the fine-tuned models'
    values; its key `recovered` holds the same of the recovered fractions, or None if pruning lost nothing.
    `dense` is the path of the dense model's record, `folders` maps each seed to the folder of its evaluation.
    """
    repeats = {seed: records.read(_record_of(folder)) for seed, folder in folders.items()}
    for seed, repeat in repeats.items():
        files = {"dense": dense, "finetuned": _record_of(folders[seed])}
        check_alike({"dense": results["dense"], "finetuned": repeat}, files)
    metrics = {}
    for name in (*(f"ppl.{text}" for text in results["dense"]["perplexity"]), "average_acc"):
        dense, pruned = _value(results["dense"], name), _value(results["pruned"], name)
        values = [_value(repeat, name) for repeat in repeats.values()]
        if dense is None:
            continue
        lost = dense - pruned if name == "average_acc" else pruned - dense
        shares = [(value - pruned) / (dense - pruned) for value in values] if lost > 0 else None
        metrics[name] = paired_stats.over_seeds(values) | {"recovered": shares and paired_stats.over_seeds(shares)}
    return {"seeds": list(folders), "metrics": metrics}


def _value(result, name):
    return result["average_acc"] if name == "average_acc" else result["perplexity"][name.removeprefix("ppl.")]["value"]


def _cost(results, trained):
    """Return seconds, tokens and peak memory of the training and of the three evaluations."""
    return {
        "training_seconds": trained["seconds"],
        "training_tokens": trained["tokens_seen"],
        "training_peak_memory_bytes": trained["peak_memory_bytes"],
        "trainable_parameters": trained["trainable_parameters"],
        "evaluation_seconds": {stage: results[stage]["provenance"]["seconds"] for stage in STAGES},
        "evaluation_peak_memory_bytes": {stage: results[stage]["provenance"]["peak_memory_bytes"] for stage in STAGES},
    }


def _warnings(record, results, trained):
    """Return what a reader must know before trusting or quoting the numbers."""
    found = list(trained["warnings"])
    for name, text in record["perplexity"].items():
        if text["verdict"] == "worse":
            found.append(f"fine-tuning made the perplexity on {name} worse")
        if text["windows"] < FEW_WINDOWS:
            found.append(
                f"perplexity on {name}: fewer than {FEW_WINDOWS} windows of text ({text['windows']}), too few for its "
                "interval to be relied on"
            )
        if "requested_seq_len" in text["protocol"]:
            facts = text["protocol"]
            found.append(
                f"perplexity on {name}: windows of {facts['seq_len']}, the model's context, "
                f"not {facts['requested_seq_len']}: do not compare it with other models' published values"
            )
    if record["average_acc"] and record["average_acc"]["verdict"] == "worse":
        found.append("fine-tuning made the mean accuracy worse")
    for name in record["zero_shot"]:
        engines = {results[stage]["zero_shot"][name]["engine"] for stage in STAGES}
        if len(engines) > 1:
            found.append(f"task {name}: the stages were scored by different engines ({', '.join(sorted(engines))})")
    if record["selection"]["criterion"].get("split") == "report":
        found.append("the candidate was chosen on the data reported here, which flatters it before fine-tuning")
    versions = [results[stage]["provenance"].get("versions") or {} for stage in STAGES]
    other = [name for name in records.PACKAGES if len({one[name] for one in versions if name in one}) > 1]
    if other:
        found.append(
            f"the stages were evaluated with other versions of {', '.join(other)}: part of a change may be theirs"
        )
    if len({results[stage]["provenance"]["device"] for stage in STAGES}) > 1:
        found.append("the stages were evaluated on different devices, whose rounding differs a little")
    return found
