"""The parts of the page as plain text cells, ready for a template: no number is worked out in a template."""

import json

from coppice.render import formatting

from .study_records import ACCURACY, STAGES

CAPTIONS = {
    "tradeoff": (
        "Accuracy against perplexity",
        "An arrow leads from the pruned model (hollow) to the fine-tuned one (filled); the star is the dense model. "
        "Perplexities of models with different tokenizers cannot be compared with each other.",
    ),
    "recovered": (
        "What came back",
        "Recovered share of what pruning lost, with 95 % intervals; 100 % (dashed) is the dense model. "
        "Pairs in which pruning lost nothing have none.",
    ),
    "task_changes": ("Change of every task", "Fine-tuned minus pruned accuracy, in points."),
    "candidates": (
        "Candidates and choices",
        "Every pruned candidate by the data that selection used; the line is the Pareto front.",
    ),
    "ranks": (
        "Rank before and after fine-tuning",
        "1 is best. Kendall's tau is 1 where fine-tuning keeps the order of the pruned models, 0 where none is kept.",
    ),
    "size": ("Accuracy against size", "Dense, pruned and fine-tuned models (LoRA's own weights are not counted)."),
    "training": ("Training curves", "Validation loss (marks) and training loss (plain) of every fine-tuning."),
    "cost": ("Time and memory", "Sum of the time over the jobs of a stage, and each job's peak memory."),
}
DASH = "–"


def cell(text, sort=None, note=""):
    """A cell of a table: what it shows, what it is sorted by, and a remark under it."""
    return {"text": text, "sort": text if sort is None else sort, "note": note}


def number(value, metric):
    return DASH if value is None else f"{metric.scale * value:.{metric.digits}f}"


def main_table(study):
    """The table of models and configs: {groups, columns, rows}."""
    metrics = study.metrics
    groups = [("", 2)] + [(_titled(metric), 4) for metric in metrics] + [("", 1)]
    columns = ["model", "config"] + [*STAGES, "recovered"] * len(metrics) + ["state"]
    rows = []
    for pair in study.pairs:
        row = [cell(pair.model), cell(pair.config)]
        for metric in metrics:
            known = pair.measured(metric) or {}
            for stage, value in pair.values(metric).items():
                note = verdict_mark(known) if stage == "finetuned" else ""
                row.append(cell(number(value, metric), "" if value is None else value, note))
            row.append(_recovered(known.get("recovered")))
        row.append(cell(pair.state, note=formatting.shortened(pair.detail)))
        rows.append(row)
    headings = ["model", "config", *(f"{m.label}, {name}" for m in metrics for name in (*STAGES, "recovered")), "state"]
    return {"groups": groups, "columns": columns, "headings": headings, "rows": rows, "texts": 2}


def verdict_mark(known):
    """The verdict of a change, for a reader's eye: a word."""
    return known.get("verdict") or ""


def _titled(metric):
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    return f"{metric.label}{f' ({metric.unit})' if metric.unit else ''}, {direction}"


def _recovered(part):
    if not part:
        return cell(DASH, "")
    if part["value"] is None:
        return cell("undefined", "", part["note"])
    interval = formatting.bounds(part["interval"], digits=0).strip()
    return cell(formatting.percent(part["value"]), part["value"], interval or part["note"])


def model_section(study, name, evidence):
    """Everything about one model: its facts and a part for each config."""
    facts = [(key, value) for key, value in study.models[name].items() if value]
    return {"name": name, "facts": facts, "pairs": [pair_section(pair, evidence) for pair in study.pairs_of(name)]}


def pair_section(pair, evidence):
    """All numbers of a pair, its selection, settings, cost, changed items, generations, warnings and provenance."""
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
        "changed": _changed(evidence.changed.get((pair.model, pair.config)) or {}),
        "generations": comparison.get("generations") or [],
        "provenance": _provenance(pair),
    }


def _numbers(pair):
    """Every number of the comparison with its interval, a row a quantity."""
    comparison = pair.comparison or {}
    columns = ["quantity", "n", *STAGES, "fine-tuned − pruned", "pruned − dense", "recovered", "p (Holm)", "verdict"]
    rows = []
    for name, text in (comparison.get("perplexity") or {}).items():
        values = [f"{text[stage]:.2f}" for stage in STAGES]
        changes = [_difference(text.get(key), 1, 2) for key in ("change", "lost")]
        counted = f"{text['tokens']:,} tokens"
        rows.append([f"perplexity {name}", counted, *values, *changes, _share(text), "", text["verdict"]])
    for name, task in pair.tasks.items():
        values = [f"{100 * task[stage]:.1f}" for stage in STAGES]
        changes = [_difference(task.get(key), 100, 1) for key in ("change", "lost")]
        p = formatting.plain_probability(task.get("p_holm"))
        rows.append([f"{name} ({task['metric']}, %)", f"{task['n']:,}", *values, *changes, "", p, task["verdict"]])
    if mean := comparison.get("average_acc"):
        values = [f"{100 * mean[stage]:.1f}" for stage in STAGES]
        changes = [_difference(mean.get(key), 100, 1) for key in ("change", "lost")]
        rows.append(["mean accuracy (%)", "", *values, *changes, _share(mean), "", mean["verdict"]])
    return {"columns": columns, "rows": rows} if rows else None


def _difference(part, scale, digits):
    if not isinstance(part, dict):
        return ""
    interval = formatting.bounds(part["interval"], scale, digits, signed=True)
    return f"{scale * part['value']:+.{digits}f}{interval}"


def _share(part):
    recovered = part["recovered"]
    if recovered["value"] is None:
        return f"undefined: {recovered['note']}"
    return formatting.share(recovered) + (f" ({recovered['note']})" if recovered["interval"] is None else "")


def _selection(pair):
    info = pair.selection
    if not info:
        return []
    criterion, second = info["criterion"], info.get("runner_up")
    rows = [
        ("candidate", info["candidate"]),
        ("pruned by", settings_text(info.get("pruning"))),
        (
            "chosen by",
            f"{criterion['words']}: {info['value']:.4g}, {info.get('metrics_from', '')}",
        ),
        ("runner-up", formatting.margin(second).removeprefix("next ") if second else "none"),
        ("considered", f"{len(info.get('candidates_considered') or [])} candidates"),
    ]
    reused = (pair.comparison or {}).get("reused_from")
    return rows + ([("reused", formatting.reused(reused))] if reused else [])


def settings_text(settings):
    """Settings in a line: "method width, ratio 0.25"; what is not set is left out."""
    parts = []
    for key, value in (settings or {}).items():
        if isinstance(value, dict):
            parts.append(f"{key} ({settings_text(value)})")
        elif value is not None and value != []:
            shown = "+".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{key} {shown}")
    return ", ".join(parts)


def _training(pair):
    record = pair.training
    if not record:
        return []
    settings = record.get("settings") or {}
    lora = settings_text(settings.get("lora"))
    rest = settings_text({key: value for key, value in settings.items() if key not in ("lora", "report_to")})
    losses = [record.get(key) for key in ("first_validation_loss", "validation_loss")]
    rows = [("LoRA", lora), ("settings", rest), ("rows", f"{record.get('train_rows', DASH):,} to train on")]
    if None not in losses:
        rows.append(
            ("validation loss", f"{losses[0]:.4f} at first, {losses[1]:.4f} at best (step {record['best_step']})")
        )
    rows.append(("trainable", f"{record['trainable_parameters']:,} of {record['all_parameters']:,} parameters"))
    return rows


def _cost(pair):
    cost = (pair.comparison or {}).get("cost")
    if not cost:
        return []
    rows = [("training", f"{formatting.duration(cost['training_seconds'])}, {cost['training_tokens']:,} tokens")]
    rows.append(("peak memory", formatting.memory(cost.get("training_peak_memory_bytes"))))
    evaluations = cost["evaluation_seconds"].items()
    rows.append(("evaluation", ", ".join(f"{stage} {formatting.duration(seconds)}" for stage, seconds in evaluations)))
    for stage in STAGES:
        if measured := (getattr(pair, stage) or {}).get("cost"):
            rows.append((f"measured, {stage}", _measured(measured)))
    return rows


def _measured(cost):
    """Sizes and speed of one model in a sentence."""
    times = [
        f"at batch {speed['batch_size']} {speed['prefill_tokens_per_second']:,.0f} prompt tokens/s and "
        f"{1000 * speed['decode_seconds_per_token']:.1f} ms a new token"
        for speed in cost["speed"]
    ]
    sizes = (
        f"{cost['macs_per_token']['linear']:,} MACs a token in linear layers, "
        f"{cost['nonzero_parameters']:,} of {cost['parameters']:,} parameters not zero, "
        f"{cost['weight_bytes'] / 2**20:,.1f} MiB of weights"
    )
    return "; ".join([sizes, *times])


def _seeds(seeds):
    """Rows (quantity, values by seed, mean, spread) where a study repeated the training."""
    if not seeds:
        return None
    rows = []
    for name, part in seeds["metrics"].items():
        scale, digits = (100, 1) if name == ACCURACY.key else (1, 2)
        values = [f"{scale * value:.{digits}f}" for value in part["values"]]
        spread = DASH if part["sd"] is None else f"{scale * part['sd']:.{digits}f}"
        mean = f"{scale * part['mean']:.{digits}f}{formatting.bounds(part['interval'], scale, digits)}"
        rows.append([name, *values, mean, spread])
    return {"columns": ["quantity", *(f"seed {seed}" for seed in seeds["seeds"]), "mean", "sd"], "rows": rows}


def _changed(tasks):
    """[(task, kind, item)] of the items shown."""
    words = {"gained": "wrong to right", "lost": "right to wrong"}
    found = [
        item | {"task": task, "kind": words[kind]}
        for task, kinds in tasks.items()
        for kind, items in kinds.items()
        for item in items[:1]
    ]
    return found


def _provenance(pair):
    rows = []
    named = [
        ("selection", pair.selection),
        *((stage, getattr(pair, stage)) for stage in STAGES),
        ("training", pair.training),
    ]
    for name, record in named:
        known = (record or {}).get("provenance") or {}
        if known:
            prints = {key: value for key, value in (known.get("fingerprints") or {}).items() if isinstance(value, str)}
            shown = ", ".join(f"{key} {value[:12]}" for key, value in prints.items())
            where = f"{known.get('device')}, seed {known.get('seed')}, {known.get('started')}"
            rows.append((name, f"{where}; {shown}" if shown else where))
    return [*rows, ("all records behind it", f"coppice trace {pair.folders['finetuned']}")] if rows else rows


def measured(study, metadata):
    """How it was measured: protocols, tasks, versions, fingerprints, seeds, and what the caller adds."""
    evaluations = [record for pair in study.pairs for stage in STAGES if (record := getattr(pair, stage))]
    others = [record for pair in study.pairs for record in (pair.training, pair.comparison) if record]
    return {
        "protocols": _protocols(evaluations),
        "tasks": _tasks(evaluations),
        "versions": _distinct(evaluations + others, "versions"),
        "devices": sorted({str((record.get("provenance") or {}).get("device")) for record in evaluations + others}),
        "seeds": sorted({str((record.get("provenance") or {}).get("seed")) for record in evaluations + others}),
        "fingerprints": _fingerprints(evaluations),
        "metadata": [(key, value if isinstance(value, str) else plain_json(value)) for key, value in metadata.items()],
    }


def plain_json(value):
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _protocols(evaluations):
    """One row for each text and protocol in use; more than one for a text means that numbers do not compare."""
    rows = {}
    for record in evaluations:
        for name, text in (record.get("perplexity") or {}).items():
            facts = {key: repr(value) if key == "join" else value for key, value in text["protocol"].items()}
            rows[name, settings_text(facts)] = None
    return list(rows)


def _tasks(evaluations):
    rows = {}
    for record in evaluations:
        for name, task in (record.get("zero_shot") or {}).items():
            facts = {"n": task.get("n"), "version": task.get("version"), "engine": task.get("engine")}
            rows[name, task.get("metric"), settings_text(facts)] = None
    return list(rows)


def _distinct(found, key):
    """name -> all values seen, in a line each."""
    values = {}
    for record in found:
        for name, value in ((record.get("provenance") or {}).get(key) or {}).items():
            values.setdefault(name, {})[str(value)] = None
    return [(name, ", ".join(seen)) for name, seen in values.items()]


def _fingerprints(evaluations):
    values = {}
    for record in evaluations:
        prints = ((record.get("provenance") or {}).get("fingerprints") or {}).get("datasets") or {}
        for name, value in prints.items():
            values.setdefault(name, {})[str(value)[:16]] = None
    return [(name, ", ".join(seen)) for name, seen in values.items()]
