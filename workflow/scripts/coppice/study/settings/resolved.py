"""Sections as a study resolves them: with the sources of models and data sets found and the roles of splits known."""

from typing import Literal

from pydantic import Field

from .sections.data_sets import Dataset
from .sections.models import Model
from .sections.section import Section


class Source(Section):
    """Where a model or data set comes from: a hub id, an absolute path, or the name of a miniature."""

    kind: Literal["hub", "local", "miniature"]
    path: str


class StudyModel(Model):
    """A model of the study. Its grid is resolved apart from it, as the candidates of the model.

    `model_type` is that of a local folder's config.json; None for other models, whose config.json comes later.
    """

    prune: None = Field(None, exclude=True)
    source: Source
    model_type: str | None = Field(None, exclude=True)


class StudyDataset(Dataset):
    """A data set of the study. `uses` says which columns it needs besides those of a task: text, training."""

    source: Source
    uses: list[str] = Field([])
