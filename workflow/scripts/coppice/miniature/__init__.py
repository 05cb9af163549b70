"""The miniature studies: small generated worlds, and tiny models that are trained on them.

The text world (`build`) has the data sets of the default study, and six causal language models (`pretraining`). The
picture world (`picture_world`) and the code world (`code_world`) have data sets for other kinds of model, which
`kind_training` trains. `prepare` writes them all in the form that every stage reads.
"""

from .build import DATASETS, build_world
from .tiny_models import KIND_MODELS

__all__ = ["DATASETS", "KIND_MODELS", "build_world"]

# Increase one of them if that world or its models change, so that they are generated again
PROTOCOL = 1
PICTURES_PROTOCOL = 1
CODE_PROTOCOL = 1
KINDS_PROTOCOL = 1
