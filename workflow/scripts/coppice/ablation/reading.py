"""Read the arms of an ablation from their records, and check that they were trained alike, at an equal budget."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import Json, PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.stats.metrics import LOSS, Metric, named
from coppice.study.settings.resolved import Budget
from coppice.study.settings.sections.ablation import ChooseBy

# What must be the same in all arms, seed by seed, and how a difference is reported
ALIKE = (
    (("provenance", "fingerprints", "weights"), "a different starting checkpoint"),
    (("provenance", "fingerprints", "tokenizer"), "a different tokenizer"),
    (("provenance", "fingerprints", "datasets"), "different training data"),
    (("data",), "different settings of finetune.data"),
    (("prompt",), "a different prompt format"),
    (("train_rows",), "a different number of training rows"),
    (("validation_rows",), "a different number of validation rows"),
)
# Unit of the budget -> what must be equal in all arms, and its name in messages; the first is what the budget limits
SPENT = {
    "max_steps": (("steps", "steps"), ("tokens_seen", "tokens")),
    "tokens": (("tokens_seen", "tokens"),),
    "flops": (("flops", "operations"),),
}


def ranking_metric(choose_by: ChooseBy) -> Metric:
    """Return the `Metric` that ranks the arms, in the chosen direction."""
    return replace(named(choose_by.metric), higher_is_better=choose_by.mode == "max")


@dataclass(frozen=True)
class Arm:
    """An arm with all its seeds: `runs` maps a seed to the content of its arm.json, `folders` to its folder."""

    name: str
    runs: dict[int, Record]
    folders: dict[int, Path]

    @property
    def first(self) -> Record:
        """The run with the first seed; its settings and sizes are those of all runs."""
        return next(iter(self.runs.values()))

    @property
    def settings(self) -> Record:
        """Its flat settings."""
        return self.first["settings"]

    @property
    def stage(self) -> str | None:
        """The stage that it belongs to, if the ablation is staged."""
        return self.first["stage"]

    @property
    def unfit(self) -> str | None:
        """Why it was not trained to the end, if it did not fit its device or diverged."""
        return self._noted("unfit")

    @property
    def raced_out(self) -> Record | None:
        """The rung at which a race stopped it: {share, step, validation_loss}."""
        return self._noted("raced_out")

    def _noted(self, key: str) -> Json:
        """Return `key` of the first run that has it, or None."""
        return next((run[key] for run in self.runs.values() if run.get(key)), None)

    @property
    def trained(self) -> bool:
        """Whether the arm was trained to the end, with every seed."""
        return not any(run.get("unfit") or run.get("raced_out") for run in self.runs.values())

    def measured(self, part: str) -> bool:
        """Return whether the arm was evaluated on the rows of `part`: selection or report."""
        return self.trained and all(part in run["measured"] for run in self.runs.values())

    def values(self, metric: Metric, part: str = "selection") -> list[float]:
        """Return the value of `metric` for each seed, in order: on the rows of `part`, or in the training's record."""
        if metric.key == LOSS.key:
            return [metric.value(run) for run in self.runs.values()]
        return [_found(result, metric) for result in self.evaluations(part)]

    def mean(self, fact: str) -> float:
        """Return the mean over seeds of `fact`, a number in every arm.json."""
        return sum(run[fact] for run in self.runs.values()) / len(self.runs)

    def value(self, metric: Metric, part: str = "selection") -> float:
        """Return the mean of `metric` over seeds."""
        values = self.values(metric, part)
        return sum(values) / len(values)

    def evaluations(self, part: str) -> list[Record]:
        """Return the evaluations on the rows of `part`, one per seed."""
        return self._evaluations[part]

    @cached_property
    def _evaluations(self) -> dict[str, list[Record]]:
        return {
            part: [records.read(folder / part / "evaluation_results.json") for folder in self.folders.values()]
            for part in ("selection", "report")
            if self.measured(part)
        }


def _found(result: Record, metric: Metric) -> float:
    value = metric.value(result)
    return result["other_tasks"][metric.name]["value"] if value is None else value


def arm(name: str, paths: Iterable[PathLike]) -> Arm:
    """Return the Arm in the arm.json files at `paths`, one per seed."""
    runs = {content["seed"]: (content, Path(path).parent) for path in paths for content in [records.read(path)]}
    return Arm(name, {s: run for s, (run, _) in runs.items()}, {s: folder for s, (_, folder) in runs.items()})


def unequal(arms: Sequence[Arm], budget: Budget) -> dict[str, list[str]]:
    """Return arm -> sentences on why it cannot be compared: different data, start or budget.

    Arms are compared with what most of them agree on. An arm is left out with all its seeds,
    even if only one seed was trained differently.
    """
    trained = [one for one in arms if one.trained]
    beyond = {one.name: sentences for one in trained if (sentences := _off_budget(one, budget))}
    within = [one for one in trained if one.name not in beyond]
    # try each arm as the reference: the one that the fewest arms differ from represents the majority
    found = [_against(one, within, budget) for one in within]
    return beyond | min(found, key=len, default={})


def _off_budget(arm: Arm, budget: Budget) -> list[str]:
    """Return one sentence per seed whose training did not spend the budget."""
    key, words = SPENT[budget.unit][0]
    found = []
    for seed, run in arm.runs.items():
        spent, amount = _spent(run, key), budget.amount
        # a training ends with the step that reaches the budget, and steps differ in size
        room = 0 if budget.unit == "max_steps" else 3 * spent / run["steps"]
        if not amount <= spent <= amount + room:
            found.append(f"{arm.name}: seed {seed} was trained for {spent:.6g} {words}, but the budget is {amount:.6g}")
    return found


def _against(first: Arm, trained: Sequence[Arm], budget: Budget) -> dict[str, list[str]]:
    """Return arm -> sentences on how it differs from `first`."""
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


def check_equal(ablation: str, arms: Sequence[Arm], budget: Budget) -> None:
    """Raise CoppiceError if an arm cannot be compared with the others."""
    for sentences in unequal(arms, budget).values():
        raise CoppiceError(
            f"ablation {ablation}: {sentences[0]}, so the arms cannot be compared. Delete its arm.json and run "
            "snakemake again."
        )


def _seeds(first: Arm, second: Arm) -> Iterator[str]:
    if list(first.runs) != list(second.runs):
        yield f"it was trained with other seeds ({', '.join(map(str, second.runs))})"


def _differences(first: Record, second: Record, budget: Budget, where: str) -> Iterator[str]:
    for keys, words in ALIKE:
        if _at(first, keys) != _at(second, keys):
            yield f"{where} was trained with {words}"
    for key, words in SPENT[budget.unit]:
        a, b = _spent(first, key), _spent(second, key)
        if abs(a - b) > _slack(first, second, key, budget.unit):
            yield f"{where} was trained for {b:.6g} {words} instead of {a:.6g}, a different budget"


def _at(record: Record, keys: Iterable[str]) -> Json:
    for key in keys:
        record = record[key]
    return record


def _spent(run: Record, key: str) -> float:
    return run["tokens_seen"] * run["operations"] if key == "flops" else run[key]


def _slack(first: Record, second: Record, key: str, unit: str) -> float:
    """Return by how much the spending of two runs may differ.

    A budget in tokens or operations ends with the step that reaches it, so two runs may differ by the size of a step;
    twice the mean step allows for large ones.
    """
    if unit == "max_steps":
        return 0
    return max(_spent(run, key) / run["steps"] for run in (first, second)) * 2
