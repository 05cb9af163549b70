"""Format the numbers and settings of arms for readers."""

import math

from coppice.core.aliases import Record
from coppice.render import formatting
from coppice.stats import metrics as known
from coppice.study.settings.resolved import Budget

from .reading import Arm


def label(metric: known.Metric, part: str = "report") -> str:
    """Return the name of a metric: "validation loss", "mean accuracy", "perplexity on ptb" or "boolq".

    It says so if the metric was measured on selection rows, by which arms are ranked, instead of report rows.
    """
    rows = "" if part == "report" or metric.key == known.LOSS.key else ", selection rows"
    return f"{metric.spoken}{rows}"


def value(metric: known.Metric, number: float) -> str:
    """Return a value with its unit: "2.3817", "24.31", "61.2 %"."""
    return f"{metric.shown(number)}{metric.sign}"


def difference(metric: known.Metric, found: dict) -> str:
    """Return a difference with its interval: in percent if values are compared by ratios, else in the metric's unit."""
    number, interval = found["value"], found["interval"]
    if metric.log:
        # `measuring` takes differences of logarithms
        number, interval = math.expm1(number), interval and [math.expm1(bound) for bound in interval]
        return f"{100 * number:+.1f} %{formatting.bounds(interval, signed=True)}"
    return formatting.difference(metric, found, signed=True)


def metrics(arm: Arm) -> list[known.Metric]:
    """Return the metrics of the arm's evaluation on report rows: the first one and its parts, then the others."""
    return known.found_in(arm.evaluations("report")[0])


def trains(arm: Arm) -> str:
    """Return "trains 12,288 parameters (1.2 %)"."""
    return f"trains {arm.first['trainable_parameters']:,} parameters ({arm.first['trainable_percent']:.2f} %)"


def share_of(arm: Arm, other: Arm) -> str:
    """Return the trained parameters of one arm as a percentage of another's: "25 %"."""
    return formatting.percent(arm.first["trainable_parameters"] / other.first["trainable_parameters"])


def size(number: float) -> str:
    """Return a number of bytes as "1.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"


def memory(arm: Arm) -> tuple[int, str]:
    """Return (bytes, "GPU" or "host"): the largest peak of an arm's trainings, of the GPU if all of them used one."""
    peaks = [run["peak_memory_bytes"] for run in arm.runs.values()]
    kind = "gpu" if all("gpu" in peak for peak in peaks) else "host"
    return max(peak[kind] for peak in peaks), kind.replace("gpu", "GPU")


def budget(wanted: Budget) -> str:
    """Return a budget as "60 steps", "2e+06 tokens" or "1e+15 floating-point operations"."""
    unit = {"max_steps": "steps", "tokens": "tokens", "flops": "floating-point operations"}[wanted.unit]
    return f"{wanted.amount:,} {unit}" if isinstance(wanted.amount, int) else f"{wanted.amount:g} {unit}"


def settings(arm: Arm) -> str:
    """Return the settings of an arm, "r 16, alpha 32, dropout 0.05, ...", without defaults that change nothing."""
    own = arm.settings
    if own["train"] == "all":
        parts = ["all weights"]
    else:
        modules = own["target_modules"]
        names = modules if isinstance(modules, str) else ", ".join(modules)
        parts = [f"r {own['r']}, alpha {own['alpha']:g}, dropout {own['dropout']:g}, {names}"]
        parts += [f"bias {own['bias']}"] if own["bias"] != "none" else []
        parts += [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if own[key]]
        parts += [f"init {own['init']}"] if own["init"] != "default" else []
        parts += [_tower(name, one) for name, one in own.get("towers", {}).items()]
    return ", ".join([*parts, f"learning rate {own['learning_rate']:g}"])


def _tower(name: str, own: str | Record) -> str:
    """Return what differs in a tower: "vision frozen", or "vision with r 32, alpha 64"."""
    if isinstance(own, str):
        return f"{name} {own}"
    given = {key.replace("_", " "): one for key, one in own.items() if one is not None}
    texts = [f"{key} {' and '.join(one) if isinstance(one, list) else one}" for key, one in given.items()]
    return f"{name} with {', '.join(texts)}"


def overfitting(arm: Arm) -> str | None:
    """Return a note if the validation loss ended more than 1 % above its best value, else None."""
    for seed, run in arm.runs.items():
        losses = [(entry["step"], entry["eval_loss"]) for entry in run["history"] if "eval_loss" in entry]
        if not losses:
            continue
        best, last = min(losses, key=lambda point: point[1]), losses[-1]
        if last[1] > 1.01 * best[1]:
            return (
                f"seed {seed} overfits: validation loss {best[1]:.4f} at step {best[0]}, but {last[1]:.4f} at step "
                f"{last[0]}; the checkpoint with the lowest loss was evaluated"
            )
    return None


def gap(run: Record) -> float | None:
    """Return the last validation loss minus the mean training loss of the last fifth of the steps, or None."""
    history, steps = run["history"], run["steps"]
    late = [entry["loss"] for entry in history if "loss" in entry and entry["step"] > 0.8 * steps]
    checks = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return checks[-1] - sum(late) / len(late) if late and checks else None
