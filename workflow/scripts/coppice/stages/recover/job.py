"""What a training is told, and what it trains: the two things that its parts hand to each other."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from coppice import models


@dataclass(frozen=True)
class Job:
    """One training, as every one of its processes gets it.

    identity: {model, config}; datasets: name -> path of its dataset.json; settings: the section `finetune` with the
    `prompt` resolved; key: a digest of all that decides what is learnt; prints: fingerprints of weights, tokenizer and
    datasets; until, each, expected: as of `training.finetune`; resume: the checkpoint folder it goes on from; budget:
    tokens in memory at a time.
    """

    identity: dict
    source: models.Source
    datasets: dict
    settings: dict
    seed: int
    output: Path
    key: str
    prints: dict
    until: float | None = None
    each: bool = False
    expected: int | None = None
    resume: Path | None = None
    budget: int = 0


@dataclass(frozen=True)
class Learner:
    """A model that is ready to be trained.

    kind: the module that says how, `recipe` (LoRA) or `all_weights`; settings: those of the job with the length of the
    training settled; sharded: whether the processes share the weights; counts: {trainable, all, base}_parameters.
    """

    model: object
    kind: ModuleType
    settings: dict
    sharded: bool
    counts: dict
