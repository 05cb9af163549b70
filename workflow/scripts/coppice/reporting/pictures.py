"""The figures themselves. Each draws into a figure, or returns a sentence that says why there is nothing to draw."""

import math

from . import tables
from .figures import BLUE, COLOURS, FAINT, GREEN, INK, MARKERS, ORANGE, PURPLE, WIDTH
from .study import ACCURACY

PANELS = 24
LABELLED = 40


def tradeoff(figure, study, frames):
    """Accuracy against perplexity: an arrow from pruned to fine-tuned, the dense point beside it."""
    texts = [metric for metric in study.metrics if not metric.is_accuracy][:2]
    pairs = [p for p in study.pairs if any(_points(p, text) for text in texts)]
    if not pairs:
        return "No pair has accuracy and perplexity by now."
    figure.set_size_inches(WIDTH, 4.6)
    colour, kinds = _colours(study)
    shape = {config: MARKERS[place % len(MARKERS)] for place, config in enumerate(study.configs)}
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        for pair in pairs:
            _arrow(axes, _points(pair, text), colour[pair.model], shape[pair.config])
        values = [x for pair in pairs for x, _ in _points(pair, text).values()]
        if values and max(values) > 4 * min(values):
            _log(axes.xaxis, axes.set_xscale)
        axes.set_xlabel(f"{text.label} (lower is better)")
    panels[0].set_ylabel("mean zero-shot accuracy (%)")
    handles = [_handle(c, "o", name) for name, c in kinds.items()]
    handles += [_handle(FAINT, shape[config], config) for config in study.configs]
    handles += [
        _handle(FAINT, "o", "pruned", hollow=True),
        _handle(FAINT, "o", "fine-tuned"),
        _handle(FAINT, "*", "dense"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _points(pair, text):
    """Stage -> (perplexity, accuracy in per cent) of the stages that have both."""
    accuracy, perplexity = pair.values(ACCURACY), pair.values(text)
    return {
        stage: (perplexity[stage], 100 * accuracy[stage])
        for stage in accuracy
        if accuracy[stage] is not None and perplexity[stage] is not None
    }


def _arrow(axes, points, colour, marker):
    if "dense" in points:
        axes.plot(*points["dense"], "*", color=colour, markersize=9, alpha=0.9)
    if "pruned" in points:
        axes.plot(*points["pruned"], marker, color=colour, markerfacecolor="none", markersize=6)
    if "finetuned" in points:
        axes.plot(*points["finetuned"], marker, color=colour, markersize=6)
    if "pruned" in points and "finetuned" in points:
        axes.annotate(
            "",
            xy=points["finetuned"],
            xytext=points["pruned"],
            arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.7, "shrinkA": 4, "shrinkB": 4},
        )


def recovered(figure, study, frames):
    """The recovered fraction of each pair with its interval, for accuracy and for perplexity."""
    metrics = study.metrics[:3]
    pairs = [pair for pair in study.compared if any(_recovered(pair, metric) for metric in metrics)]
    metrics = [metric for metric in metrics if any(_recovered(pair, metric) for pair in pairs)]
    if not pairs:
        return "No recovered fraction is defined by now."
    names = list(dict.fromkeys(pair.model for pair in pairs))
    configs = study.configs
    figure.set_size_inches(WIDTH, 1.6 + len(names) * (0.12 + 0.17 * len(configs)))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for pair in pairs:
            if part := _recovered(pair, metric):
                _interval(axes, part, names.index(pair.model), configs.index(pair.config), len(configs))
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.axvline(100, color=FAINT, linewidth=1, linestyle="--")
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -150), min(high, 250))
        axes.set_title(metric.label)
        axes.set_xlabel("recovered (% of the loss)")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    handles = [_handle(_config_colour(i), MARKERS[i % len(MARKERS)], config) for i, config in enumerate(configs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _recovered(pair, metric):
    part = (pair.measured(metric) or {}).get("recovered") or {}
    return part if part.get("value") is not None else None


def _interval(axes, part, row, place, count):
    y = row + (place - (count - 1) / 2) * 0.6 / count
    value, colour = 100 * part["value"], _config_colour(place)
    axes.plot(value, y, MARKERS[place % len(MARKERS)], color=colour, markersize=5)
    if part["interval"]:
        axes.plot([100 * bound for bound in part["interval"]], [y, y], color=colour, linewidth=1.5)


def task_changes(figure, study, frames):
    """The change of every task in every pair, as a heat map in points."""
    import numpy

    names, pairs = study.task_names, [pair for pair in study.compared if pair.tasks]
    if not pairs:
        return "No zero-shot task was compared by now."
    columns = [*names, "mean"]
    cells = numpy.full((len(pairs), len(columns)), numpy.nan)
    for row, pair in enumerate(pairs):
        parts = [pair.tasks.get(name) for name in names] + [pair.measured(ACCURACY)]
        cells[row] = [numpy.nan if part is None else 100 * part["change"]["value"] for part in parts]
    figure.set_size_inches(WIDTH, 1.5 + 0.28 * len(pairs))
    axes = figure.subplots()
    limit = max(1.0, float(numpy.nanmax(numpy.abs(cells))))
    image = axes.pcolormesh(cells, cmap="PuOr", vmin=-limit, vmax=limit, edgecolors="none")
    axes.invert_yaxis()
    axes.set_xticks(
        [place + 0.5 for place in range(len(columns))], columns, rotation=30, ha="left", rotation_mode="anchor"
    )
    axes.xaxis.tick_top()
    axes.set_yticks([row + 0.5 for row in range(len(pairs))], [f"{pair.model} / {pair.config}" for pair in pairs])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (row, column), value in numpy.ndenumerate(cells):
        _cell(axes, row, column, value, limit, pairs[row], columns[column])
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.03)
    bar.set_label("change by fine-tuning (points of accuracy); * clear after Holm's correction")
    bar.outline.set_visible(False)
    return None


def _cell(axes, row, column, value, limit, pair, name):
    if math.isnan(value):
        axes.text(column + 0.5, row + 0.5, "–", ha="center", va="center", color=FAINT)
        return
    part = pair.measured(ACCURACY) if name == "mean" else pair.tasks[name]
    star = "" if part["verdict"] == "no clear change" else "*"
    # the map is dark at both ends and pale in the middle, in the light page and in the dark one
    colour = "#ffffff" if abs(value) > 0.62 * limit else "#000000"
    axes.text(column + 0.5, row + 0.5, f"{value:+.1f}{star}", ha="center", va="center", color=colour, fontsize=7.5)


def candidates(figure, study, frames):
    """Every candidate of each model by accuracy and perplexity, the Pareto front and the chosen ones."""
    frame = frames["candidates"]
    accuracy, perplexity = tables.accuracy_and_perplexity(frame)
    names = [name for name in study.models if (frame["model"] == name).any()]
    if not names or not accuracy or not perplexity:
        return "No candidates with accuracy and perplexity are listed by now."
    labels = f"perplexity ({perplexity.removeprefix('ppl.')})", "mean accuracy (%)"
    for axes, name in _panels(figure, names, *labels):
        rows = frame[frame["model"] == name].dropna(subset=[accuracy, perplexity])
        x, y = rows[perplexity].to_numpy(), 100 * rows[accuracy].to_numpy()
        axes.plot(x, y, "o", color=FAINT, markersize=5)
        front = sorted((a, b) for a, b, best in zip(x, y, tables.pareto(y, x), strict=True) if best)
        axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1) if front else None
        for place, config in enumerate(study.configs):
            chosen = rows[[config in names_.split(",") for names_ in rows["chosen_as"]]]
            axes.plot(
                chosen[perplexity],
                100 * chosen[accuracy],
                MARKERS[place % len(MARKERS)],
                color=_config_colour(place),
                markersize=9 + 3 * place,
                markerfacecolor="none",
                markeredgewidth=1.8,
            )
        axes.margins(0.12)
    handles = [_handle(FAINT, "o", "candidate, line: Pareto front")]
    handles += [
        _handle(_config_colour(i), MARKERS[i % len(MARKERS)], f"chosen as {config}", hollow=True)
        for i, config in enumerate(study.configs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    return None


def ranks(figure, study, frames):
    """Rank of the pairs before and after fine-tuning, with Kendall's tau: does the best start stay the best?"""
    from scipy.stats import kendalltau

    metrics = [(metric, _ranked(study, metric)) for metric in study.metrics[:2]]
    metrics = [(metric, ranked) for metric, ranked in metrics if len(ranked) > 1]
    if not metrics:
        return "Fewer than two pairs were measured before and after fine-tuning."
    count = max(len(ranked) for _, ranked in metrics)
    labelled = count <= LABELLED
    figure.set_size_inches(WIDTH, 1.6 + 0.24 * count if labelled else 5.0)
    for axes, (metric, ranked) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        before, after = zip(*((b, a) for _, b, a in ranked), strict=True)
        found = kendalltau(before, after)
        sure = "" if math.isnan(found.pvalue) else f", p = {found.pvalue:.3f}"
        axes.set_title(f"{metric.label}\nKendall's tau {found.statistic:.2f}{sure}")
        for pair, b, a in ranked:
            place = study.configs.index(pair.config)
            colour, marker = _config_colour(place), MARKERS[place % len(MARKERS)]
            axes.plot([0, 1] if labelled else b, [b, a] if labelled else a, marker=marker, color=colour, markersize=5)
        axes.invert_yaxis()
        axes.set_ylabel("rank before fine-tuning" if labelled else "rank after fine-tuning")
        if labelled:
            axes.set_xticks([0, 1], ["pruned", "fine-tuned"])
            axes.set_xlim(-0.1, 1.1)
            axes.set_yticks(before, [f"{pair.model} / {pair.config}  {b:g}" for pair, b, _ in ranked], fontsize=7.5)
            axes.grid(axis="y", visible=False)
        else:
            axes.set_xlabel("rank before fine-tuning")
    handles = [_handle(_config_colour(i), MARKERS[i % len(MARKERS)], c) for i, c in enumerate(study.configs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _ranked(study, metric):
    """[(pair, rank before, rank after)], 1 for the best."""
    from scipy.stats import rankdata

    values = [(pair, pair.values(metric)) for pair in study.pairs]
    values = [(pair, v["pruned"], v["finetuned"]) for pair, v in values if None not in (v["pruned"], v["finetuned"])]
    sign = -1 if metric.higher_is_better else 1
    if not values:
        return []
    before, after = (rankdata([sign * row[place] for row in values]) for place in (1, 2))
    return [(row[0], float(b), float(a)) for row, b, a in zip(values, before, after, strict=True)]


def size(figure, study, frames):
    """Accuracy against the number of parameters, and against measured latency where it was measured."""
    panels = [("parameters (millions)", lambda record: _millions(record.get("parameters")))]
    if any(_latency(record) for pair in study.pairs for record in (pair.dense, pair.pruned, pair.finetuned) if record):
        panels.append(("latency (ms a token)", _latency))
    rows = [pair for pair in study.pairs if pair.values(ACCURACY)["pruned"] is not None]
    if not rows:
        return "No accuracy was measured by now."
    colour, kinds = _colours(study)
    for axes, (label, read) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for pair in rows:
            place = study.configs.index(pair.config)
            for stage, value in pair.values(ACCURACY).items():
                x = read(getattr(pair, stage) or {})
                if x is not None and value is not None:
                    marker = "*" if stage == "dense" else MARKERS[place % len(MARKERS)]
                    face = "none" if stage == "pruned" else None
                    axes.plot(x, 100 * value, marker, color=colour[pair.model], markerfacecolor=face, markersize=6)
        axes.set_xlabel(label)
        axes.set_ylabel("mean zero-shot accuracy (%)")
    handles = [_handle(c, "o", name) for name, c in kinds.items()]
    handles += [_handle(FAINT, MARKERS[i % len(MARKERS)], c) for i, c in enumerate(study.configs)]
    handles += [
        _handle(FAINT, "o", "pruned", hollow=True),
        _handle(FAINT, "o", "fine-tuned"),
        _handle(FAINT, "*", "dense"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return None


def _millions(count):
    return None if count is None else count / 1e6


def _latency(record):
    return (record.get("cost") or {}).get("latency_ms_per_token")


def training(figure, study, frames):
    """Training and validation loss of every pair, a panel a model."""
    names = [name for name in study.models if any(pair.history for pair in study.pairs_of(name))]
    if not names:
        return "No training has ended by now."
    for axes, name in _panels(figure, names, "optimizer step", "loss (nats a target token)"):
        for pair in study.pairs_of(name):
            place = study.configs.index(pair.config)
            colour, marker = _config_colour(place), MARKERS[place % len(MARKERS)]
            for key, style in (
                ("loss", {"alpha": 0.6, "linewidth": 1}),
                ("eval_loss", {"marker": marker, "markersize": 4}),
            ):
                steps = [(entry["step"], entry[key]) for entry in pair.history or [] if key in entry]
                if steps:
                    axes.plot(*zip(*steps, strict=True), color=colour, **style)
    handles = [
        _handle(_config_colour(i), MARKERS[i % len(MARKERS)], f"{c}: validation (marks), training (plain)", line="-")
        for i, c in enumerate(study.configs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2))
    return None


def cost(figure, study, frames):
    """Time and peak memory of every stage: the sum over its jobs, and the largest of them."""
    jobs = frames["jobs"]
    if jobs.empty:
        return "No job has left its time and memory by now."
    stages = list(dict.fromkeys(jobs["stage"]))
    figure.set_size_inches(WIDTH, 1.3 + 0.42 * len(stages))
    left, right = figure.subplots(1, 2, sharey=True)
    totals = jobs.groupby("stage", sort=False)["seconds"].sum().reindex(stages)
    unit, scale = ("hours", 3600) if totals.max() > 7200 else ("minutes", 60)
    bars = left.barh(range(len(stages)), totals / scale, color=BLUE, height=0.6)
    counts = [f" {total / scale:.2g} in {(jobs['stage'] == s).sum()} jobs" for s, total in totals.items()]
    left.bar_label(bars, counts, fontsize=8, color=INK)
    left.margins(x=0.45)
    left.set_xlabel(f"time, sum over jobs ({unit})")
    left.set_yticks(range(len(stages)), stages)
    left.invert_yaxis()
    for kind, colour, offset in (("host", ORANGE, -0.15), ("gpu", PURPLE, 0.15)):
        rows = jobs.dropna(subset=[kind])
        y = [stages.index(stage) + offset for stage in rows["stage"]]
        if len(rows):
            right.plot(
                rows[kind] / 2**30,
                y,
                "o",
                color=colour,
                markersize=5,
                alpha=0.7,
                label=f"{kind.replace('gpu', 'GPU')} memory",
            )
    right.set_xlim(left=0)
    right.set_xlabel("peak memory of each job (GiB)")
    figure.legend(loc="outside lower center", ncols=2)
    return None


def _colours(study):
    """(model -> colour, legend name -> colour): by model up to six, else by family, the rest alike."""
    names = list(study.models)
    if len(names) <= len(COLOURS):
        colours = dict(zip(names, COLOURS, strict=False))
        return colours, colours
    families = list(dict.fromkeys(study.models[name]["family"] or "other" for name in names))
    kinds = {family: COLOURS[i] if i < len(COLOURS) else FAINT for i, family in enumerate(families)}
    if len(families) > len(COLOURS):
        legend = dict(list(kinds.items())[: len(COLOURS)]) | {"other families": FAINT}
        return {name: kinds[study.models[name]["family"] or "other"] for name in names}, legend
    return {name: kinds[study.models[name]["family"] or "other"] for name in names}, kinds


def _config_colour(place):
    return (BLUE, ORANGE, GREEN, PURPLE)[place % 4]


def _handle(colour, marker, label, hollow=False, line=""):
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    return Line2D([], [], color=colour, marker=marker, linestyle=line, markerfacecolor=face, label=label)


def _stage_handles():
    return [
        _handle(FAINT, "o", "pruned", hollow=True),
        _handle(FAINT, "o", "fine-tuned"),
        _handle(FAINT, "*", "dense"),
    ]


def _panels(figure, names, x, y):
    """(axes, name) of a grid with a panel a model, three in a row; those beyond `PANELS` are said to be left out.

    `x` and `y` name the axes, below the lowest panel of each column and left of each row.
    """
    shown = names[:PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(WIDTH, 1.1 + 2.1 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (axes, name) in enumerate(zip(grid, shown, strict=False)):
        axes.set_title(name)
        if place % columns == 0:
            axes.set_ylabel(y)
        if place + columns >= len(shown):
            axes.set_xlabel(x)
        yield axes, name
    for axes in grid[len(shown) :]:
        axes.remove()
    if len(names) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(names)} models; the tables have all")


def _log(axis, set_scale):
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter("")
