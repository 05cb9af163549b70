"""The miniature study's small world: generated data sets (`build`) and the tiny models trained on them (`training`)."""

from .build import DATASETS, build_world

__all__ = ["DATASETS", "build_world"]

PROTOCOL = 1  # counts up whenever the world or its models come out otherwise, so that they are made anew
