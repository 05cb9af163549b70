"""The miniature study: a small generated world of datasets (`build`) and tiny models trained on it (`pretraining`)."""

from .build import DATASETS, build_world

__all__ = ["DATASETS", "build_world"]

PROTOCOL = 1  # increase it if the world or its models change, so that they are generated again
