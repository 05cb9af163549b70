"""The parts of the page as formatted text, ready for the templates, which only place it.

Nothing here computes a result: every number comes from a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Estimate, Record
from coppice.models import sparsity
from coppice.render import formatting
from coppice.stats import metrics

from . import shown_rows, speeds
from .study_records import STAGE_LABELS, STAGES, Pair, Study

if TYPE_CHECKING:
    from .measurements import Measurements

# {leading} is the metric that answers the questions, {other} the first other one.
CAPTIONS = {
    "tradeoff": (
        "{leading} against {other}",
        "Each arrow leads from a pruned model (hollow) to its fine-tuned version (filled); stars are the dense models.",
    ),
    "recovered": (
        "Recovered share",
        "The share of what pruning lost that fine-tuning recovered, with 95 % intervals; the dashed line at 100 % is "
        "the dense model. Pairs in which pruning lost nothing are left out.",
    ),
    "task_changes": (
        "Change in each task",
        "Accuracy of the fine-tuned model minus accuracy of the pruned one, in percentage points. The color is the "
        "verdict, not the size of the change: only a change beyond the noise, marked by *, counts as better or worse.",
    ),
    "candidates": (
        "Candidates and selection",
        "Every pruned candidate, measured on the selection data. The line is the Pareto front; outlined markers show "
        "the selected candidates.",
    ),
    "ranks": (
        "Rank before and after fine-tuning",
        "Rank 1 is the best. Kendall's tau is 1 if fine-tuning keeps the order of the pruned models, and 0 if the two "
        "orders are unrelated. It is left out for fewer than four pairs.",
    ),
    "size": (
        "{leading} against size",
        "Dense, pruned and fine-tuned models; adapter weights are not counted. Latencies were measured in turns; pairs "
        "whose dense and pruned models differ by no more than the spread of the measurement are left out.",
    ),
    "training": (
        "Training curves",
        "Validation loss (line with markers) and training loss (plain line) of every training.",
    ),
    "cost": ("Time and memory", "Total time of each stage, summed over its jobs, and peak memory of each job."),
}
DASH = "–"
WIDEST = 3  # metrics in one table


def caption(study: Study, name: str) -> tuple[str, str]:
    """Return the title and the caption of a figure of a study or of one of its groups."""
    leading, other = study.axes
    title, text = CAPTIONS[name]
    title = title.format(leading=leading.heading, other=other.kind)
    if name == "tradeoff" and other.log:
        text += " Perplexities of models with different tokenizers cannot be compared."
    return f"{title} ({formatting.listed(study.models)})" if study.is_part else title, text


def cell(text: object, sort: object = None, note: str = "") -> Record:
    """Return a table cell: its text, the value the browser sorts by (default: the text), and a note under the text."""
    return {"text": text, "sort": text if sort is None else sort, "note": note}


def number(value: float | None, metric: metrics.Metric) -> str:
    """Return a metric's value in its unit with its number of digits, or a dash for a missing value."""
    return DASH if value is None else metric.shown(value)


def main_tables(study: Study) -> list[Record]:
    """Return the tables of all models and configs, by up to `WIDEST` metrics each: the two axes come first.

    Returns:
        for each table {groups: [(heading, columns spanned)], columns: short headings below the groups, headings: full
        headings for Markdown, rows: lists of cells, texts: how many of the first columns hold text}.
    """
    shown = study.ranked_metrics
    return [_main_table(study, shown[place : place + WIDEST]) for place in range(0, max(len(shown), 1), WIDEST)]


def _main_table(study: Study, shown: Sequence[metrics.Metric]) -> Record:
    groups = [("", 2)] + [(f"{m.with_unit(m.label)}, {m.better}", 4) for m in shown] + [("", 1)]
    labels = [*STAGE_LABELS.values(), "recovered"]
    columns = ["model", "config"] + labels * len(shown) + ["state"]
    rows = []
    for pair in study.pairs:
        row = [cell(pair.model), cell(pair.config)]
        for metric in shown:
            compared = pair.measured(metric) or {}
            for stage, value in pair.values(metric).items():
                note = verdict_note(compared) if stage == "finetuned" else ""
                row.append(cell(number(value, metric), "" if value is None else value, note))
            row.append(_recovered(compared.get("recovered")))
        row.append(cell(pair.state, note=formatting.shortened(pair.detail)))
        rows.append(row)
    headings = ["model", "config", *(f"{m.label}, {name}" for m in shown for name in labels), "state"]
    return {"groups": groups, "columns": columns, "headings": headings, "rows": rows, "texts": 2}


def verdict_note(compared: Record) -> str:
    """Return the verdict of a change ("better", "worse" or "no clear change"), or "" if there is none."""
    return compared.get("verdict") or ""


def _recovered(part: Estimate | None) -> Record:
    if not part:
        return cell(DASH, "")
    if part["value"] is None:
        return cell("undefined", "", part["note"])
    interval = formatting.bounds(part["interval"], digits=0).strip()
    return cell(formatting.percent(part["value"]), part["value"], interval or part["note"])


def model_section(study: Study, name: str, measurements: Measurements, data: shown_rows.DataSets) -> Record:
    """Return everything about one model: its facts and one section per config."""
    facts = [(key, value) for key, value in study.models[name].items() if value]
    pairs = [pair_section(pair, measurements, data) for pair in study.pairs_of(name)]
    return {"name": name, "facts": facts, "pairs": pairs}


def pair_section(pair: Pair, measurements: Measurements, data: shown_rows.DataSets) -> Record:
    """Return everything about one pair: state, numbers, selection, training, cost, items, warnings, provenance."""
    comparison = pair.comparison or {}
    return {
        "config": pair.config,
        "state": pair.state,
        "detail": pair.detail,
        "selection": _selection(pair),
        "numbers": _numbers(pair),
        "training": _training(pair),
        "cost": _cost(pair),
        "seeds": _seeds(comparison.get("seeds")),
        "warnings": comparison.get("warnings") or [],
        "changed": _changed(measurements.changed.get((pair.model, pair.config)) or {}),
        "generations": comparison.get("generations") or [],
        "examples": shown_rows.of_pair(pair, data),
        "provenance": _provenance(pair),
    }


def _numbers(pair: Pair) -> Record | None:
    """Return every number of the comparison with its interval, one row per quantity."""
    comparison = pair.comparison or {}
    labels = STAGE_LABELS.values()
    columns = ["quantity", "n", *labels, "fine-tuned − pruned", "pruned − dense", "recovered", "p (Holm)", "verdict"]
    rows = [_of_metric(comparison, m) for m in metrics.details_in(comparison)]
    return {"columns": columns, "rows": rows} if rows else None


def _of_metric(comparison: Record, metric: metrics.Metric) -> list[str]:
    """Return the row of one metric."""
    part = metric.part(comparison)
    facts = ", ".join(filter(None, (part.get("metric"), metric.unit)))
    counted = f"{part['tokens']:,} tokens" if "tokens" in part else f"{part['n']:,}" if "n" in part else ""
    return [
        f"{metric.spoken} ({facts})" if facts else metric.spoken,
        counted,
        *(metric.shown(part[stage]) for stage in STAGES),
        *(_difference(part.get(key), metric) for key in ("change", "lost")),
        _share(part) if metric.reported else "",
        formatting.plain_probability(part.get("p_holm")),
        part["verdict"],
    ]


def _difference(part: Estimate | None, metric: metrics.Metric) -> str:
    if not isinstance(part, dict):
        return ""
    interval = formatting.bounds(part["interval"], metric.scale, metric.digits, signed=True)
    return f"{metric.shown(part['value'], '+')}{interval}"


def _share(part: Record) -> str:
    recovered = part["recovered"]
    if recovered["value"] is None:
        return f"undefined: {recovered['note']}"
    return formatting.share(recovered) + (f" ({recovered['note']})" if recovered["interval"] is None else "")


def _selection(pair: Pair) -> list[tuple[str, str]]:
    info = pair.selection
    if not info:
        return []
    criterion, second = info["criterion"], info.get("runner_up")
    rows = [
        ("candidate", info["candidate"]),
        ("pruning", formatting.pruning(info.get("pruning") or {})),
        ("chosen by", f"{criterion['words']} = {info['value']:.4g} ({info.get('metrics_from') or 'source unknown'})"),
        ("runner-up", formatting.margin(second).removeprefix("next ") if second else "none"),
        ("considered", f"{len(info.get('candidates_considered') or [])} candidates"),
    ]
    reused = (pair.comparison or {}).get("reused_from")
    return rows + ([("reused", formatting.reused(reused))] if reused else [])


def _training(pair: Pair) -> list[tuple[str, str]]:
    record = pair.training
    if not record:
        return []
    settings = record.get("settings") or {}
    lora = formatting.settings(settings.get("lora"))
    rest = formatting.settings({key: value for key, value in settings.items() if key not in ("lora", "report_to")})
    losses = [record.get(key) for key in ("first_validation_loss", "validation_loss")]
    rows = [("LoRA", lora), ("settings", rest), ("training rows", f"{record.get('train_rows', DASH):,}")]
    if None not in losses:
        rows.append(
            ("validation loss", f"{losses[0]:.4f} at the start, {losses[1]:.4f} at best (step {record['best_step']})")
        )
    if kl := record.get("kl_to_teacher"):
        rows.append(
            ("KL to the teacher", f"{kl['before']:.4f} nats per target before training, {kl['after']:.4f} after")
        )
    rows.append(("trainable parameters", f"{record['trainable_parameters']:,} of {record['all_parameters']:,}"))
    kept = record.get("sparsity")
    if kept and sparsity.is_sparse(kept["before"]):
        rows.append(("zeros", _zeros(kept, (pair.finetuned or {}).get("masked_merge"))))
    return rows


def _zeros(kept: Record, masked: Record | None) -> str:
    """Return what became of the zeros of a sparse start. kept: a training's `sparsity`; masked: `masked_merge`."""
    parts = [f"{sparsity.described(kept['before'])} before training (keep_sparsity: {kept['mode']})"]
    if kept["after"]:
        merged = ", adapter merged" if kept["adapter"] else ""
        parts.append(f"{sparsity.described(kept['after'])} after it{merged}")
    if kept["mask_loss"]:
        losses = kept["mask_loss"]
        parts.append(
            f"loss {losses['masked']:.4f} merged with the zeros kept, {losses['adapter']:.4f} with the adapter beside"
        )
    parts += [
        f"perplexity on {text} {value:.4g} merged" for text, value in ((masked or {}).get("perplexity") or {}).items()
    ]
    return "; ".join(parts)


def _cost(pair: Pair) -> list[tuple[str, str]]:
    cost = (pair.comparison or {}).get("cost")
    if not cost:
        return []
    rows = [("training", f"{formatting.duration(cost['training_seconds'])}, {cost['training_tokens']:,} tokens")]
    rows.append(("peak memory", formatting.memory(cost.get("training_peak_memory_bytes"))))
    evaluations = cost["evaluation_seconds"].items()
    times = (f"{STAGE_LABELS.get(stage, stage)} {formatting.duration(seconds)}" for stage, seconds in evaluations)
    rows.append(("evaluation", ", ".join(times)))
    for stage in STAGES:
        if measured := (getattr(pair, stage) or {}).get("cost"):
            rows.append((f"measured on the {STAGE_LABELS[stage]} model", _measured(measured)))
    return rows + speeds.rows(pair)


def _measured(cost: Record) -> str:
    """Return the size of one model as text."""
    active = cost.get("active_parameters", cost["parameters"])  # older records lack it
    used = "" if active == cost["parameters"] else f", {_number(active)} used by one token"
    return (
        f"{cost['parameters']:,} parameters, {_number(cost['nonzero_parameters'])} nonzero{used}; "
        f"{_number(cost['macs_per_token']['linear'])} MACs per token in linear layers and experts; "
        f"{cost['weight_bytes'] / 2**20:,.1f} MiB of weights"
    )


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _seeds(seeds: Record | None) -> Record | None:
    """Return the table of values per seed with mean and standard deviation, or None without repeated trainings."""
    if not seeds:
        return None
    rows = []
    for name, part in seeds["metrics"].items():
        metric = metrics.named(name)
        values = [metric.shown(value) for value in part["values"]]
        spread = DASH if part["sd"] is None else metric.shown(part["sd"])
        mean = f"{metric.shown(part['mean'])}{formatting.bounds(part['interval'], metric.scale, metric.digits)}"
        rows.append([name, *values, mean, spread])
    return {"columns": ["quantity", *(f"seed {seed}" for seed in seeds["seeds"]), "mean", "sd"], "rows": rows}


def _changed(tasks: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[Record]:
    """Return one item per task that fine-tuning turned right, and one that it turned wrong."""
    words = {"gained": "wrong to right", "lost": "right to wrong"}
    return [
        item | {"task": task, "kind": words[kind]}
        for task, kinds in tasks.items()
        for kind, items in kinds.items()
        for item in items[:1]
    ]


def _provenance(pair: Pair) -> list[tuple[str, str]]:
    rows = []
    named = [
        ("selection", pair.selection),
        *((STAGE_LABELS[stage], getattr(pair, stage)) for stage in STAGES),
        ("training", pair.training),
    ]
    for name, record in named:
        made = (record or {}).get("provenance") or {}
        if made:
            prints = {key: value for key, value in (made.get("fingerprints") or {}).items() if isinstance(value, str)}
            shown = ", ".join(f"{key} {value[:12]}" for key, value in prints.items())
            # a selection is made by arithmetic alone, so its record has neither a device nor a time
            known = [made.get("device"), f"seed {made.get('seed')}", made.get("started")]
            where = ", ".join(part for part in known if part)
            rows.append((name, f"{where}; {shown}" if shown else where))
    return [*rows, ("to list every record", f"coppice trace {pair.folders['finetuned']}")] if rows else rows
