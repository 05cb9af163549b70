"""Draw elements that several figures share: legend entries, log axes with plain numbers, a plot of candidates."""

from coppice.stats import pareto

from .style import BLUE, FAINT, GREEN, MARKERS, ORANGE, PURPLE


def config_colour(place):
    """Return the color of the config at `place`."""
    return (BLUE, ORANGE, GREEN, PURPLE)[place % 4]


def handle(colour, marker, label, hollow=False, line=""):
    """Return a legend entry: a marker, with a line through it if `line` is a line style."""
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    return Line2D([], [], color=colour, marker=marker, linestyle=line, markerfacecolor=face, label=label)


def log(axis, set_scale):
    """Make an axis logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter("")


def config_marker(place):
    """Return the marker of the config at `place`."""
    return MARKERS[place % len(MARKERS)]


def candidates(axes, perplexity, accuracy, chosen):
    """Draw candidates as points, their Pareto front as a line, and a marker for each config around those it chose.

    perplexity, accuracy: of each candidate; chosen: for each config, in order, the indices of the candidates it chose.
    """
    axes.plot(perplexity, accuracy, "o", color=FAINT, markersize=5)
    best = pareto.pareto(accuracy, perplexity)
    front = sorted((x, y) for x, y, on in zip(perplexity, accuracy, best, strict=True) if on)
    if front:
        axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1)
    for place, picks in enumerate(chosen):
        axes.plot(
            [perplexity[i] for i in picks],
            [accuracy[i] for i in picks],
            config_marker(place),
            color=config_colour(place),
            markersize=min(9 + 3 * place, 18),
            clip_on=False,
            markerfacecolor="none",
            markeredgewidth=1.8,
        )
    axes.margins(0.12)


def name(axes, x, y, names, most=12):
    """Write each point's name beside it, on the side with more room; write none if there are more than `most`."""
    if len(names) > most:
        return
    middle = sum(axes.get_xlim()) / 2
    for place, text in zip(zip(x, y, strict=True), names, strict=True):
        left = place[0] > middle
        axes.annotate(
            text,
            place,
            # a front rises to the right: the label goes above it in the right half, below it in the left half
            xytext=(-9, 5) if left else (9, -11),
            textcoords="offset points",
            ha="right" if left else "left",
            color=FAINT,
            fontsize=7.5,
        )


def candidate_handles(configs):
    """Return the legend entries for what `candidates` draws."""
    handles = [handle(FAINT, "o", "candidate (line: Pareto front)")]
    for place, config in enumerate(configs):
        handles.append(handle(config_colour(place), config_marker(place), f"chosen by {config}", hollow=True))
    return handles
