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
