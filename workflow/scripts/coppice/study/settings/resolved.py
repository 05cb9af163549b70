"""Sections as a study resolves them: sources of models and data sets found, roles of splits known, arms made."""

from typing import Annotated, Literal

from pydantic import Field

from coppice.core.aliases import Record

from .sections.ablation import ChooseBy
from .sections.data_sets import Dataset
from .sections.evaluate import Evaluate
from .sections.finetune import Finetune
from .sections.forms import Number
from .sections.models import Dtype, Kind, Model, Prompt
from .sections.section import Section

Unit = Literal["max_steps", "tokens", "flops"]


class Source(Section):
    """Where a model or data set comes from: a hub id, an absolute path, or the name of a miniature."""

    kind: Literal["hub", "local", "miniature"]
    path: str


class StudyModel(Model):
    """A model of the study. Its grid and its own sections are resolved apart from it.

    `model_type` is that of a local folder's config.json; None for other models, whose config.json comes later.
    """

    prune: None = Field(None, exclude=True)
    calibration: None = Field(None, exclude=True)
    finetune: None = Field(None, exclude=True)
    evaluate: None = Field(None, exclude=True)
    kind: Kind
    source: Source
    model_type: str | None = Field(None, exclude=True)


class StudyDataset(Dataset):
    """A data set of the study. `uses` says which columns it needs besides those of a task (`dataset_uses.Use`)."""

    source: Source
    uses: list[str] = Field([])


class Budget(Section):
    """The length of training that all arms of an ablation share."""

    unit: Unit
    amount: Annotated[Number, Field(gt=0)]


class ModelStart(Section):
    """The start of an ablation: a dense model of the study, or the pruned checkpoint that a `config` chose of it."""

    kind: Literal["model"] = "model"
    model: str
    config: str | None


class CheckpointStart(Section):
    """The start of an ablation: the checkpoint in the folder `path`."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str
    prompt: Prompt
    dtype: Dtype | None
    trust_remote_code: bool
    context_length: int | None = None
    eos_token: str | None = None


class StudyArm(Section):
    """An arm of an ablation.

    `changes` are the flat settings that it changes: in those of the winner of the stage `after`, or else in the base.
    `stage` is its own stage. `report` says whether it is measured by the report's metrics.
    """

    stage: str | None = None
    changes: Record
    after: str | None = None
    report: bool = True


class StudyStage(Section):
    """A stage of a staged ablation: the names of its arms, and the stage before it."""

    name: str
    arms: list[str]
    after: str | None = None


class Race(Section):
    """A race: at each rung, a rising share of the budget, one in `eta` arms continues."""

    eta: Number
    rungs: list[float]


class ArmComparison(Section):
    """How the arms of an ablation are compared: by which metric, and with which arm."""

    budget: Budget
    choose_by: ChooseBy
    reference: str
    stages: list[StudyStage]


class StudyAblation(ArmComparison):
    """An ablation of the study.

    `finetune` is the section that all arms share, `base` are its flat settings, as arms change them. `evaluate` is the
    section for the metrics of the report.
    """

    start: ModelStart | CheckpointStart
    finetune: Finetune
    base: Record
    seeds: list[int]
    eval_steps: int | None
    evaluate: Evaluate
    arms: dict[str, StudyArm]
    racing: Race | None
