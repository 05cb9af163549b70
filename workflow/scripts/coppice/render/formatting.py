"""What several reports say in the same words."""


def margin(second):
    """ "next NAME, 0.01 behind (within noise: ...)" of a runner-up, {candidate, margin, interval, within_noise}."""
    words = f"next {second['candidate']}, {second['margin']:.4g} behind"
    if second.get("within_noise") is None:
        return words
    low, high = second["interval"]
    sure = "within noise" if second["within_noise"] else "beyond noise"
    return f"{words} ({sure}: difference {low:.4g} to {high:.4g})"


def reused(config):
    """What is said of results that were taken over from another config."""
    return f"the same candidate as {config}, whose training and evaluations are used for both"


def count(number, noun):
    """ "1 model", "6 models"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items):
    """ "a, b and c"."""
    items = [str(item) for item in items]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def percent(value):
    """ "62 %" of a share."""
    return f"{100 * value:.0f} %"


def bounds(interval, scale=100, digits=1, signed=False):
    """ "[0.4, 2.0]", or "" without an interval."""
    if interval is None:
        return ""
    low, high = (scale * bound for bound in interval)
    sign = "+" if signed else ""
    return f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
