"""Compare one model and config before and after fine-tuning, with the dense model as the reference.

Reads only records and samples of evaluations, pairs them item by item, and writes `comparison.json` (everything) and
`comparison_report.txt` (for a terminal of 100 columns). Nothing is evaluated here.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from coppice.core import mirror, records
from coppice.core.aliases import Estimate, PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.render import formatting
from coppice.stats import across_models, metrics, paired_stats, pairing

from .report_text import render

logger = logging.getLogger("coppice.comparison")

STAGES = ("dense", "pruned", "finetuned")
DENSE, PRUNED, FINETUNED = STAGES
FEW_ITEMS = 100  # the interval of an accuracy over fewer items can be wider than 20 points


def compare(
    identity: Record,
    evaluations: Mapping[str, Path],
    selection: PathLike,
    finetuning: PathLike,
    output: Mapping[str, PathLike],
    seed: int = 0,
    seeds: Mapping[int, Path] | None = None,
) -> None:
    """Compare the three evaluations of one model and config, and write both files.

    Args:
        identity: {model, config}.
        evaluations: stage -> folder of its evaluation.
        selection: path of selection_info.json.
        finetuning: path of finetuning_config.json.
        output: {record, report}, the files to write.
        seed: the study's, for the record.
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
    compared = _compared(results, folders)
    record = identity | {
        "candidate": chosen["candidate"],
        "reused_from": results["finetuned"].get("reused_from"),
        "pruning": chosen["pruning"],
        "selection": {key: chosen[key] for key in ("criterion", "value", "runner_up", "metrics_from")},
        "parameters": {stage: results[stage]["parameters"] for stage in STAGES},
        "sparsity": {stage: results[stage].get("sparsity") for stage in STAGES},
        "masked_merge": results["finetuned"].get("masked_merge"),
        **compared,
        "extremes": _extremes(compared.get(metrics.AVERAGE.mean_of)),
        "cost": _cost(results, trained),
        "generations": _generations(results),
    }
    if seeds:
        record["seeds"] = _over_seeds(results, files["dense"], seeds)
    record["warnings"] = [*chosen.get("warnings", []), *_warnings(record, results, trained)]
    inputs = {stage: results[stage]["provenance"]["fingerprints"] for stage in STAGES}
    record["provenance"] = clock.provenance({"level": paired_stats.LEVEL}, seed, **inputs)
    records.write(output["record"], record)
    with records.atomic(output["report"]) as file:
        file.write(render(record))
    logger.info("%s", output["report"])


def _record_of(folder: Path) -> Path:
    """Return the path of the record of the evaluation in `folder`."""
    return Path(folder) / "evaluation_results.json"


def _again(*files: Path) -> str:
    """Return the remedy that error messages end with: to make these records again."""
    return f"delete {formatting.listed(map(mirror.origin_of, files))} and run snakemake again"


def check_alike(results: Mapping[str, Record], files: Mapping[str, Path]) -> None:
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
        for entry in metrics.METRICS:
            if not entry.mean_of and list(result.get(entry.section) or ()) != list(first.get(entry.section) or ()):
                raise CoppiceError(
                    f"{where}the {stage} and the dense model were evaluated on different {entry.section} data; {again}"
                )
        for metric in metrics.found_in(result):
            for key in metric.alike:
                ours, theirs = (metric.part(one).get(key) for one in (result, first))
                if isinstance(ours, dict) and ours != theirs:  # name what differs, not all of a protocol
                    key = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
                    ours, theirs = ours.get(key), theirs.get(key)
                if ours != theirs:
                    raise CoppiceError(
                        f"{where}{metric.label}: the {stage} model was measured with {key} {ours}, the dense one with "
                        f"{theirs}; {again}"
                    )
        if result["provenance"]["fingerprints"]["datasets"] != first["provenance"]["fingerprints"]["datasets"]:
            raise CoppiceError(f"{where}the {stage} and the dense model were evaluated on different rows; {again}")


def _check_models(
    identity: Record, results: Mapping[str, Record], chosen: Record, trained: Record, files: Mapping[str, Path]
) -> None:
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
    for what, key, found in (
        ("evaluated as pruned", "pruned", weights["pruned"]),
        ("evaluated as finetuned", "finetuned", weights["finetuned"]),
        ("fine-tuned", "fine-tuning", trained["provenance"]["fingerprints"]["weights"]),
    ):
        if found != chosen["weights_fingerprint"]:
            raise CoppiceError(
                f"{files[key]}: the checkpoint that was {what} is not the selected one ({chosen['candidate']}); "
                f"{_again(files[key])}"
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


def _compared(results: Mapping[str, Record], folders: Sequence[Path]) -> Record:
    """Return section -> what the record holds of its metrics: by data set, or of a mean, None if it is of nothing."""
    entries = metrics.in_detail(metrics.held_by(results["dense"]))
    sections: Record = {entry.section: None if entry.mean_of else {} for entry in entries}
    known = {}  # (section, data set) -> means, which a mean over data sets uses again
    for metric in metrics.found_in(results["dense"], entries):
        if metric.mean_of:
            means = across_models.mean_of([known[metric.mean_of, name] for name in metric.names])
            sections[metric.section] = _part(metric, results, means)
            continue
        [found] = pairing.values(metric, folders, _again(*map(_record_of, folders)))
        means = known[metric.section, metric.name] = found.means(STAGES)
        part = sections[metric.section][metric.name] = _part(metric, results, means)
        if metric.right_or_wrong:
            values = dict(zip(STAGES, found.values, strict=True))
            part |= paired_stats.mcnemar(values[PRUNED] > 0.5, values[FINETUNED] > 0.5)
    for entry in entries:
        if entry.right_or_wrong:
            _correct(sections[entry.section].values())
    return sections


def _part(metric: metrics.Metric, results: Mapping[str, Record], means: across_models.Means) -> Record:
    """Return the values of a metric at the three stages, its changes, and its recovered fraction if reports show it."""
    step, shown = {FINETUNED: 1, PRUNED: -1}, means.exp() if metric.log else means
    values = dict(zip(STAGES, map(float, shown.values), strict=True))
    if metric.log:  # an evaluation holds the value of the whole text, which rounds differently
        values = {stage: metric.value(results[stage]) for stage in STAGES}
    change, higher = _interval(shown.contrast(step)), metric.higher_is_better
    facts = metric.part(results["dense"])
    part: Record = values | {key: facts[key] for key in metric.facts if key in facts} | {"change": change}
    if metric.log:
        part["change_percent"] = 100 * change["value"] / values[PRUNED]
        part["ratio"] = across_models.ratio_of(means.contrast(step))
    part["lost"] = _interval(shown.contrast({PRUNED: 1, DENSE: -1}))
    part["resampled"] = means.resampled(step)
    if "chance" in part:
        bounds = {stage: shown.contrast({stage: 1})["interval"] for stage in STAGES}
        part["at_chance"] = [stage for stage in STAGES if not bounds[stage] or bounds[stage][0] <= part["chance"]]
    if metric.reported:
        part["recovered"] = shown.recovered(DENSE, PRUNED, FINETUNED, higher)
    if not metric.right_or_wrong:
        part["verdict"] = paired_stats.verdict_of_interval(change["interval"], higher)
    return part


def _interval(estimate: Estimate) -> Estimate:
    """Return {value, interval} of an estimate: its p-value would compete with that of the exact test."""
    return {key: estimate[key] for key in ("value", "interval")}


def _correct(tasks: Collection[Record]) -> None:
    """Add the corrected p-value and the verdict to each task: with several tasks, some p-value is small by chance."""
    for task, p in zip(tasks, paired_stats.holm([task["p"] for task in tasks]), strict=True):
        task |= {"p_holm": p, "verdict": paired_stats.verdict(task["change"]["value"], p)}


def _extremes(tasks: Mapping[str, Record] | None) -> dict[str, str] | None:
    """Return the tasks with the largest and the smallest signed change."""
    if not tasks:
        return None
    ordered = sorted(tasks, key=lambda name: tasks[name]["change"]["value"])
    return {"largest": ordered[-1], "smallest": ordered[0]}


def _generations(results: Mapping[str, Record]) -> list[dict[str, str]]:
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


def _over_seeds(results: Mapping[str, Record], dense: Path, folders: Mapping[int, Path]) -> Record:
    """Return mean and spread of every metric over repeated trainings, with the seed as a random factor.

    The result is {seeds, metrics}. `metrics` maps each metric to `paired_stats.over_seeds` of the fine-tuned models'
    values; its key `recovered` holds the same of the recovered fractions, or None if pruning lost nothing.
    `dense` is the path of the dense model's record, `folders` maps each seed to the folder of its evaluation.
    """
    repeats = {seed: records.read(_record_of(folder)) for seed, folder in folders.items()}
    for seed, repeat in repeats.items():
        files = {"dense": dense, "finetuned": _record_of(folders[seed])}
        check_alike({"dense": results["dense"], "finetuned": repeat}, files)
    found = {}
    for metric in metrics.details_in(results["dense"]):
        if not metric.reported:
            continue
        whole, pruned = metric.value(results["dense"]), metric.value(results["pruned"])
        values = [metric.value(repeat) for repeat in repeats.values()]
        lost = whole - pruned if metric.higher_is_better else pruned - whole
        shares = [(value - pruned) / (whole - pruned) for value in values] if lost > 0 else None
        found[metric.key] = paired_stats.over_seeds(values) | {"recovered": shares and paired_stats.over_seeds(shares)}
    return {"seeds": list(folders), "metrics": found}


def _cost(results: Mapping[str, Record], trained: Record) -> Record:
    """Return seconds, tokens and peak memory of the training and of the three evaluations."""
    return {
        "training_seconds": trained["seconds"],
        "training_tokens": trained["tokens_seen"],
        "training_peak_memory_bytes": trained["peak_memory_bytes"],
        "trainable_parameters": trained["trainable_parameters"],
        "evaluation_seconds": {stage: results[stage]["provenance"]["seconds"] for stage in STAGES},
        "evaluation_peak_memory_bytes": {stage: results[stage]["provenance"]["peak_memory_bytes"] for stage in STAGES},
    }


def _warnings(record: Record, results: Mapping[str, Record], trained: Record) -> list[str]:
    """Return what a reader must know before trusting or quoting the numbers."""
    found = list(trained["warnings"])
    found += formatting.warned({stage: results[stage].get("warnings") or [] for stage in STAGES})
    shown = metrics.details_in(record)
    for metric in shown:
        part = metric.part(record)
        if metric.reported and part["verdict"] == "worse":
            found.append(f"fine-tuning made the {metric.spoken} worse")
        if part["resampled"]["note"]:
            found.append(f"{metric.label}: {part['resampled']['note']}")
        facts = part.get("protocol", {})
        if "requested_seq_len" in facts:
            found.append(
                f"{metric.label}: windows of {facts['seq_len']}, the model's context, "
                f"not {facts['requested_seq_len']}: do not compare it with other models' published values"
            )
    found += _at_chance(record, shown)
    found += _few_items(record, shown)
    for metric in shown:
        engines = {(metric.part(results[stage]) or {}).get("engine") for stage in STAGES if not metric.mean_of}
        if len(engines) > 1:
            found.append(f"{metric.label}: the stages were scored by different engines ({', '.join(sorted(engines))})")
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


def _at_chance(record: Record, shown: Iterable[metrics.Metric]) -> list[str]:
    """Return a warning for each metric by which a model is not better than chance."""
    parts = [(metric, metric.part(record)) for metric in shown if metric.reported]
    return [
        f"{metric.label}: the {formatting.listed(part['at_chance'])} model is not above chance "
        f"({metric.shown(part['chance'])}{metric.sign})"
        for metric, part in parts
        if part.get("at_chance")
    ]


def _few_items(record: Record, shown: Iterable[metrics.Metric]) -> list[str]:
    """Return a warning that lists the data sets with too few items, [] if there are none."""
    counts: dict[str | None, int] = {}
    for metric in shown:
        number = (metric.part(record) or {}).get("n") if metric.name else None
        if number is not None:
            counts[metric.name] = min(number, counts.get(metric.name, number))
    few = formatting.listed(f"{name} ({n})" for name, n in counts.items() if n < FEW_ITEMS)
    return [f"fewer than {FEW_ITEMS} items, too few to see any but large changes: {few}"] if few else []
