"""The arms of an ablation as their records have them, and whether they may be compared: an equal budget is checked."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coppice.core import records
from coppice.core.errors import CoppiceError

LOSS = "validation_loss"
# What the trainings of all arms have in common, seed by seed, and how it is told
ALIKE = (
    (("provenance", "fingerprints", "weights"), "another checkpoint to start from"),
    (("provenance", "fingerprints", "tokenizer"), "another tokenizer"),
    (("provenance", "fingerprints", "datasets"), "other training data"),
    (("data",), "other settings of finetune.data"),
    (("prompt",), "another form of prompt"),
    (("train_rows",), "another number of training rows"),
    (("validation_rows",), "another number of validation rows"),
)
SPENT = {
    "max_steps": (("steps", "steps"), ("tokens_seen", "tokens")),
    "tokens": (("tokens_seen", "tokens"),),
    "flops": (("flops", "operations"),),
}


@dataclass(frozen=True)
class Arm:
    """An arm with all its seeds: `runs` seed -> the content of its arm.json, `folders` seed -> where that lies."""

    name: str
    runs: dict
    folders: dict

    @property
    def first(self):
        """The run with the first seed; settings and sizes are those of all."""
        return next(iter(self.runs.values()))

    settings = property(lambda self: self.first["settings"])
    stage = property(lambda self: self.first["stage"])
    unfit = property(lambda self: self._noted("unfit"))
    raced_out = property(lambda self: self._noted("raced_out"))

    def _noted(self, key):
        """What the first run that has it says of `key`; None where none has."""
        return next((run[key] for run in self.runs.values() if run.get(key)), None)

    @property
    def trained(self):
        """Whether it was trained to the end, with every seed."""
        return not any(run.get("unfit") or run.get("raced_out") for run in self.runs.values())

    def measured(self, part):
        """Whether it was evaluated on the rows of `part`: selection or report."""
        return self.trained and all(part in run["measured"] for run in self.runs.values())

    def values(self, metric, part="selection"):
        """`metric` of each seed, in their order; of a task its accuracy, of `ppl.<text>` the perplexity."""
        if metric == LOSS:
            return [run[LOSS] for run in self.runs.values()]
        return [_found(result, metric) for result in self.evaluations(part)]

    def mean(self, fact):
        """The mean over seeds of a number that every run has."""
        return sum(run[fact] for run in self.runs.values()) / len(self.runs)

    def value(self, metric, part="selection"):
        """The mean over seeds."""
        values = self.values(metric, part)
        return sum(values) / len(values)

    def evaluations(self, part):
        """The evaluations on the rows of `part`, one a seed."""
        return self._evaluations[part]

    @cached_property
    def _evaluations(self):
        return {
            part: [records.read(folder / part / "evaluation_results.json") for folder in self.folders.values()]
            for part in ("selection", "report")
            if self.measured(part)
        }


def _found(result, metric):
    if metric.startswith("ppl."):
        return result["perplexity"][metric.removeprefix("ppl.")]["value"]
    if metric == "average_acc":
        return result["average_acc"]
    return (result["zero_shot"] | result["other_tasks"])[metric]["value"]


def arm(name, paths):
    """The Arm of the arm.json files at `paths`, one a seed."""
    runs = {content["seed"]: (content, Path(path).parent) for path in paths for content in [records.read(path)]}
    return Arm(name, {s: run for s, (run, _) in runs.items()}, {s: folder for s, (_, folder) in runs.items()})


def unequal(arms, budget):
    """What keeps arms from being compared, in sentences by arm: other data, another start, another budget spent.

    budget: {unit, amount}. What most arms agree with is what the others are held against; of an arm that was trained
    otherwise with one seed all seeds are left out.
    """
    trained = [one for one in arms if one.trained]
    beyond = {one.name: sentences for one in trained if (sentences := _off_budget(one, budget))}
    within = [one for one in trained if one.name not in beyond]
    told = [_against(one, within, budget) for one in within]
    return beyond | min(told, key=len, default={})


def _off_budget(arm, budget):
    """Where an arm's trainings did not spend the budget itself: sentences, one a seed."""
    key, words = SPENT[budget["unit"]][0]
    found = []
    for seed, run in arm.runs.items():
        spent, amount = _spent(run, key), budget["amount"]
        room = 0 if budget["unit"] == "max_steps" else 3 * spent / run["steps"]  # the step that reaches it is the last
        if not amount <= spent <= amount + room:
            found.append(f"{arm.name}: seed {seed}: trained for {spent:.6g} {words}, but the budget is {amount:.6g}")
    return found


def _against(first, trained, budget):
    """What is unequal where `first` is what the others are held against."""
    found = {}
    for one in trained:
        sentences = [*_seeds(first, one)] or [
            sentence
            for seed, run in one.runs.items()
            for sentence in _differences(first.runs[seed], run, budget, f"seed {seed}")
        ]
        if sentences:
            found[one.name] = [f"{one.name}: {sentence} than {first.name}" for sentence in sentences]
    return found


def check_equal(ablation, arms, budget):
    """Raise CoppiceError where arms are not to be compared."""
    for told in unequal(arms, budget).values():
        raise CoppiceError(
            f"ablation {ablation}: {told[0]}; they do not compare: delete its arm.json and run snakemake again"
        )


def _seeds(first, second):
    if list(first.runs) != list(second.runs):
        yield f"trained with other seeds ({', '.join(map(str, second.runs))})"


def _differences(first, second, budget, where):
    for keys, words in ALIKE:
        if _at(first, keys) != _at(second, keys):
            yield f"{where}: trained with {words}"
    for key, words in SPENT[budget["unit"]]:
        a, b = _spent(first, key), _spent(second, key)
        if abs(a - b) > _slack(first, second, key, budget["unit"]):
            yield f"{where}: trained for {b:.6g} {words} and not {a:.6g}, with another budget"


def _at(record, keys):
    for key in keys:
        record = record[key]
    return record


def _spent(run, key):
    return run["tokens_seen"] * run["operations"] if key == "flops" else run[key]


def _slack(first, second, key, unit):
    """A budget that is not in steps ends with the step that reaches it: the larger step is what two may differ by."""
    if unit == "max_steps":
        return 0
    return max(_spent(run, key) / run["steps"] for run in (first, second)) * 2
