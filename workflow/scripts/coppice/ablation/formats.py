"""Numbers of arms as a reader meets them."""

import math

from coppice.render import formatting

from .reading import LOSS


def label(metric, part="report"):
    """ "validation loss", "mean accuracy", "perplexity on ptb", "boolq"; with a word where the rows are selection's.

    What ranks arms is measured on other rows than what the report compares.
    """
    if metric == LOSS:
        return "validation loss"
    named = {"average_acc": "mean accuracy"}.get(metric, metric)
    named = f"perplexity on {metric.removeprefix('ppl.')}" if metric.startswith("ppl.") else named
    return named if part == "report" else f"{named}, selection rows"


def value(metric, number):
    """A loss with four digits, a perplexity with two, an accuracy in per cent."""
    if metric == LOSS:
        return f"{number:.4f}"
    return f"{number:.2f}" if metric.startswith("ppl.") else f"{100 * number:.1f} %"


def difference(metric, found):
    """A difference with its interval: of losses as such, of perplexities in per cent, of accuracies in points."""
    number, interval = found["value"], found["interval"]
    if metric == LOSS:
        return f"{number:+.4f}{formatting.bounds(interval, scale=1, digits=4, signed=True)}"
    if metric.startswith("ppl."):
        number, interval = math.expm1(number), interval and [math.expm1(bound) for bound in interval]
        return f"{100 * number:+.1f} %{formatting.bounds(interval, signed=True)}"
    return f"{100 * number:+.1f} points{formatting.bounds(interval, signed=True)}"


def metrics(arm):
    """(metric, whether lower is better) of what an arm was measured in for the report."""
    result = arm.evaluations("report")[0]
    names = ["average_acc"] if result["average_acc"] is not None else []
    return [(name, False) for name in [*names, *result["zero_shot"]]] + [
        (f"ppl.{name}", True) for name in result["perplexity"]
    ]


def trains(arm):
    """ "trains 12,288 parameters (1.2 %)"."""
    return f"trains {arm.first['trainable_parameters']:,} parameters ({arm.first['trainable_percent']:.2f} %)"


def share_of(arm, other):
    """ "25 %": trained parameters of one arm in those of another."""
    return formatting.percent(arm.first["trainable_parameters"] / other.first["trainable_parameters"])


def size(number):
    """Bytes: "1.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"


def memory(arm):
    """(bytes, host or GPU): the largest peak of an arm's trainings, on a GPU where one was used."""
    peaks = [run["peak_memory_bytes"] for run in arm.runs.values()]
    kind = "gpu" if all("gpu" in peak for peak in peaks) else "host"
    return max(peak[kind] for peak in peaks), kind.replace("gpu", "GPU")


def budget(wanted):
    """ "60 steps", "2e+06 tokens", "1e+15 operations"."""
    unit = {"max_steps": "steps", "tokens": "tokens", "flops": "floating-point operations"}[wanted["unit"]]
    return f"{wanted['amount']:,} {unit}" if isinstance(wanted["amount"], int) else f"{wanted['amount']:g} {unit}"


def settings(arm):
    """ "r 16, alpha 32, dropout 0.05, ..." of an arm; what says nothing is left out."""
    known = arm.settings
    if known["train"] == "all":
        parts = ["all weights"]
    else:
        modules = known["target_modules"]
        names = modules if isinstance(modules, str) else ", ".join(modules)
        parts = [f"r {known['r']}, alpha {known['alpha']:g}, dropout {known['dropout']:g}, {names}"]
        parts += [f"bias {known['bias']}"] if known["bias"] != "none" else []
        parts += [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if known[key]]
        parts += [f"init {known['init']}"] if known["init"] != "default" else []
    return ", ".join([*parts, f"learning rate {known['learning_rate']:g}"])


def overfitting(arm):
    """What is said where the validation loss rose again after its best, by more than a hundredth; else None."""
    for seed, run in arm.runs.items():
        losses = [(entry["step"], entry["eval_loss"]) for entry in run["history"] if "eval_loss" in entry]
        if not losses:
            continue
        best, last = min(losses, key=lambda point: point[1]), losses[-1]
        if last[1] > 1.01 * best[1]:
            return (
                f"seed {seed}: validation loss {best[1]:.4f} at step {best[0]}, {last[1]:.4f} at step {last[0]}: it "
                "overfits; the best step is what was measured"
            )
    return None


def gap(run):
    """Validation loss at the end minus the training loss of the last fifth of the steps; None where one is missing."""
    history, steps = run["history"], run["steps"]
    late = [entry["loss"] for entry in history if "loss" in entry and entry["step"] > 0.8 * steps]
    checks = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return checks[-1] - sum(late) / len(late) if late and checks else None
