"""The section `select`: the criteria by which candidates are chosen."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .forms import ByKind, Named, Number, Unique
from .section import Section, setting

Mode = Literal["max", "min"]


class Bounds(Section):
    """Bounds, inclusive."""

    min: Number | None = setting(None, "The smallest allowed value.")
    max: Number | None = setting(None, "The largest allowed value.")

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("too_short", "empty")
        return self


class Criterion(Section):
    """A criterion, given either by `metric` or by `pareto`."""

    metric: Annotated[str | Annotated[Unique[str], Field(min_length=1)] | None, ByKind()] = setting(
        None,
        "`average_acc`, `ppl.<data set>`, a task's name, any other metric of an evaluation such as `bleu4.<data set>`, "
        "or a numeric column of candidates.table. In a study of several kinds of models this may be a list: each model "
        "uses the first metric that its evaluation measures.",
    )
    mode: Mode | None = setting(
        None, "Whether the highest or the lowest value is best. Null decides by the metric's direction."
    )
    pareto: Literal["knee"] | None = setting(
        None,
        "`knee` considers the candidates that no other candidate beats in both `metrics` (the Pareto front) "
        "and chooses the one farthest from the line between the two ends of that front.",
    )
    metrics: Named[Annotated[Mode, Field(description="Whether a higher or a lower value is better.")]] | None = setting(
        None,
        "The two metrics of `pareto`, each with its mode. Null means average_acc (max) and the first perplexity "
        "(min), or the first two metrics of a model that is measured otherwise. Name both for models that answer rows, "
        "unless evaluate.answers.metrics says how answers are measured.",
    )
    where: Named[Bounds] = setting(
        {},
        "Bounds on metrics or on `parameters`, e.g. `{parameters: {max: 6.0e+9}}`. Candidates outside the "
        "bounds are not chosen.",
    )


class Select(Section):
    """How candidates are chosen."""

    split: Literal["selection", "report"] = setting(
        "selection",
        "Part of the data that candidates are scored on. Reports use `report`; choosing on the same rows "
        "makes the chosen candidates look better than they are.",
        reruns=["score"],
    )
    configs: Named[Criterion] = setting(
        {
            "best_acc": Criterion(metric="average_acc", mode="max"),
            "best_ppl": Criterion(metric="ppl.wikitext2", mode="min"),
        },
        "The criteria, by the names that paths and reports use. Each chooses one candidate of each model. "
        "Null drops a criterion.",
    )
