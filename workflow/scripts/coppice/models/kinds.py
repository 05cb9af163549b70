"""What the stages must know about a kind of model, and the registry of the kinds.

A stage asks the kind of its model and never branches on the kind's name. A new kind is a module of this package with a
member `KIND`, and a line in `KINDS`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from coppice.core.json_text import parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

    from .readers import Reader
    from .rows import Row
    from .towers import Anatomy, Batch, Tower

    LoadedModel = PreTrainedModel | PeftModel  # without an adapter or with one

Example = dict[str, Any]
Inputs = dict[str, Any]

# name -> the module of this package that defines the kind, as `KIND`. A model is of the first kind that fits its
# configuration. causal-lm fits every configuration, so it comes last.
KINDS = {
    "dual-encoder": "dual_encoder",
    "image-text": "image_text",
    "seq2seq": "seq2seq",
    "causal-lm": "causal_lm",
}


@dataclass(frozen=True)
class Decoding:
    """How a model generates answers.

    Attributes:
        beams: the width of the beam search; 1 is greedy.
        sample: whether tokens are drawn at random, with `seed`.
        temperature: divides the logits of a random draw.
        top_p: the share of the probability that tokens are drawn from.
        new_tokens: the most tokens of an answer.
        batch_size: the number of rows at a time.
        seed: of the random draws.
        stop: an answer ends before the first of these texts that it contains.
        strip: whether spaces around an answer are removed. Programs need their indentation.
    """

    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    new_tokens: int = 64
    batch_size: int = 32
    seed: int = 0
    stop: tuple[str, ...] = ()
    strip: bool = True

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.sample else {}
        return {"num_beams": self.beams, "do_sample": self.sample, "max_new_tokens": self.new_tokens} | drawn

    def cut(self, answer: str) -> str:
        """Return an answer without what follows the first stop text in it, and without spaces around it."""
        cut = answer[: min((place for text in self.stop if (place := answer.find(text)) >= 0), default=None)]
        return cut.strip() if self.strip else cut

    def stopping(self, texts: Sequence[str]) -> Decoding:
        """Return the same with further stop texts."""
        return replace(self, stop=tuple(dict.fromkeys((*self.stop, *texts))))


@dataclass(frozen=True)
class Validator:
    """A metric of validation rows, by which a training may choose its best checkpoint.

    Attributes:
        higher_is_better: its direction.
        outputs: (kind, model, reader, rows, decoding) -> what the metric needs of each row, in the order of the rows.
            Several processes divide the rows among them.
        value: (outputs of all rows, rows) -> the metric.
    """

    higher_is_better: bool
    outputs: Callable[[ModelKind, LoadedModel, Reader, Sequence[Row], Decoding], list[Any]]
    value: Callable[[Sequence[Any], Sequence[Row]], float]


class Forward(Protocol):
    """Runs one model on micro-batches. An engine has one for its model, and an objective may have another's."""

    device: torch.device


@dataclass(frozen=True)
class MicroBatch:
    """A part of the targets of one optimizer step, small enough to fit in memory.

    Attributes:
        run: runs the model of a Forward and returns the states [N, width] that predict the targets (logits, if the
            model changes them after its output layer). An objective may run a second model, such as a teacher, on the
            same tokens.
        targets: what the states predict, [N].
        tokens: the number of tokens that the model is run on, padding included.
    """

    run: Callable[[Forward], torch.Tensor]
    targets: torch.Tensor
    tokens: int

    def without_targets(self) -> MicroBatch:
        """Return the same run of the model without any target, so that all its gradients are zero."""
        return MicroBatch(lambda forward: self.run(forward)[:0], self.targets[:0], self.tokens)


@dataclass(frozen=True)
class Fallback:
    """Why an accelerator is not used for a model, and how the model must then be run.

    Attributes:
        reason: why the accelerator would not be exact; a clause such as "its local attention is cut by ...".
        alone: True if each text must have a pass of its own, because texts of different lengths in one batch change
            each other's numbers.
        forget: makes the model forget what it keeps from earlier passes; called before a series of passes.
    """

    reason: str
    alone: bool
    forget: Callable[[], None]


class Engine(Protocol):
    """Computes the summed loss of the examples of one optimizer step, micro-batch by micro-batch.

    The sum over the micro-batches, divided by the number of targets in the step, is the loss of the step. An engine
    whose loss is no sum over examples (a contrastive loss) computes what couples them in `micro_batches`, which is
    called once for each step.

    Attributes:
        forward: runs the engine's model.
        arrangement: how examples are arranged, for the record.
        warnings: what a reader of the training's record must know about the arrangement, in sentences.
        token_limit: the most tokens in a micro-batch; an example that is longer runs alone. It may be lowered at any
            time.
    """

    forward: Forward
    arrangement: str
    warnings: Sequence[str]
    token_limit: int

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of some examples; each target is in exactly one of them."""

    def summed_loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the summed loss of a micro-batch's targets: a float32 scalar."""


class Scorer(Protocol):
    """Scores continuations of contexts.

    Attributes:
        alone: True if texts of different lengths in one batch change each other's numbers. The scorer heeds that by
            itself; whoever runs other batches must too.
    """

    alone: bool

    def score(
        self, requests: Sequence[tuple[list[int], list[int]]], label: str = "", quiet: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is the greedy continuation) of each (input ids, continuation ids)."""


class ModelKind(ABC):
    """A kind of model, as the stages see it.

    Attributes:
        name: its key in `KINDS`.
        noun: how messages name a model of this kind, with its article.
        row_kinds: the kinds of rows (keys of `data.prompts.KINDS`) that it can learn from.
        task_type: peft's task type; None if peft has none that calls the model as it is.
        prunable: the values of `model_type` in a configuration whose towers it knows.
        prunes_together: whether a grid point that names no tower prunes all of them, each by the point's share. If not,
            it prunes the first.
        adapter_groups: what `finetune.lora.target_modules` may name -> words, one of which is part of a name on the
            path of each linear layer that is meant (`attn` is part of `model.layers.0.self_attn.q_proj`).
        tower_names: the towers that `finetune.lora.towers` may name, which need not be prunable.
        frozen_towers: those of them that are not trained unless `finetune.lora.towers` names them.
        evaluators: the evaluators (of `stages.evaluate`) that apply to it, in the order in which they run.
        validators: what `finetune.best_by` may name, beside the validation loss.
        sees: whether it reads pictures, so that its checkpoints have an image processor.
        pipeline: the task by which the hub lists its models.
        distills: whether it can learn a teacher's predictions: the forward passes of its engines then have a `head`,
            which gives logits from their states (None: they return logits).
        coupled: whether the loss of an example depends on the other examples of its step. Its engines then also have
            `gathers` and `example_losses` (see `contrastive.Engine`).
        arrangements: the values of `finetune.arrangement` that its engines know.
        learns_inputs: whether `finetune.data.train_on_inputs` can be true.
        prompts: the prompt formats that it can be trained and asked in. If alpaca and chat are among them, the
            variant of a model (base or instruct) decides which is the default; otherwise it is the first.
        pruned_towers: the towers that a grid point may name.
    """

    name: str
    noun: str
    row_kinds: tuple[str, ...]
    task_type: str | None
    prunable: tuple[str, ...]
    prunes_together: bool = False
    adapter_groups: Mapping[str, tuple[str, ...]]
    evaluators: tuple[str, ...]
    tower_names: tuple[str, ...] = ("text",)
    frozen_towers: tuple[str, ...] = ()
    validators: Mapping[str, Validator] = MappingProxyType({})
    sees: bool = False
    pipeline: str = "text-generation"
    distills: bool = False
    coupled: bool = False
    arrangements: tuple[str, ...] = ("sorted",)
    learns_inputs: bool = False
    prompts: tuple[str, ...] = ("alpaca", "chat", "none")
    pruned_towers: tuple[str, ...] = ("text",)

    @abstractmethod
    def fits(self, config: PretrainedConfig | SimpleNamespace) -> bool:
        """Return whether a model is of this kind. config: its configuration, or the content of its config.json."""

    @abstractmethod
    def auto_class(self) -> type:
        """Return the auto class of transformers that loads a checkpoint and builds a model from a configuration."""

    @abstractmethod
    def context_length(self, config: PretrainedConfig) -> int | None:
        """Return the number of tokens that a model with this configuration was made for; None if it does not say."""

    @abstractmethod
    def anatomies(self, config: PretrainedConfig) -> tuple[Anatomy, ...]:
        """Return the towers of blocks that can be pruned; none if the architecture is not supported."""

    def cannot_prune(self, model_type: str) -> str:
        """Return the message that models of this type cannot be pruned here, with what can be done instead."""
        return (
            f"Coppice cannot prune models of type '{model_type}' (it prunes {', '.join(self.prunable)}). Prune it with "
            "another tool and list the checkpoints in candidates.table: Coppice then scores, fine-tunes, evaluates and "
            "compares them."
        )

    @abstractmethod
    def towers(self, model: LoadedModel) -> list[Tower]:
        """Return the towers of a loaded model, in the order of `anatomies`."""

    # Training

    def adaptable(self, model: LoadedModel, layers: Sequence[str]) -> list[str]:
        """Return those of a model's linear layers, given by their dotted names, that an adapter can take."""
        return list(layers)

    def tower_of(self, layer: str) -> str:
        """Return the tower, of `tower_names`, in which a module of a plain model lies. layer: its dotted name."""
        return self.tower_names[0]

    @abstractmethod
    def examples(self, rows: Sequence[Row], reader: Reader, cutoff: int, train_on_inputs: bool) -> list[list[Example]]:
        """Turn rows into examples: inputs and labels, without padding.

        Args:
            rows: formatted rows.
            reader: the model's tokenizer and, if it sees, its image processor.
            cutoff: the most tokens of an example.
            train_on_inputs: whether prompts are learned, too.

        Returns:
            For each row its examples: one, none if nothing is left to learn, or several.
        """

    @abstractmethod
    def length(self, example: Example) -> int:
        """Return the number of tokens that a model is run on for an example."""

    @abstractmethod
    def targets(self, examples: Sequence[Example]) -> int:
        """Return the number of targets (of tokens, for a text) in examples, by which a summed loss is divided."""

    def sort_key(self, example: Example) -> int | list[int]:
        """Return the key by which validation examples are sorted, so that neighbors share work or a length."""
        return self.length(example)

    @abstractmethod
    def engine(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> Engine:
        """Return the fastest exact engine for a model, with an adapter or without.

        Args:
            model: the model to train.
            token_limit: the most tokens at a time.
            arrangement: `finetune.arrangement`; None chooses.
        """

    @abstractmethod
    def inputs(self, examples: Sequence[Example], device: torch.device) -> Inputs:
        """Return padded model inputs of a few examples, as keyword arguments."""

    # Evaluation

    def token_losses(self, model: LoadedModel) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that gives the losses [B, L-1] of texts [B, L], each token's after those before it.

        Only kinds that the evaluator `perplexity` applies to have it.
        """
        raise NotImplementedError(f"{self.noun} has no perplexity")

    def scorer(self, model: LoadedModel, dtype: torch.dtype | None) -> Scorer | Fallback:
        """Return a fast and exact scorer of continuations for the evaluator `zero_shot`, or why there is none.

        dtype: of mixed precision, or None for the model's own.
        """
        return Fallback(f"there is no scorer for {self.noun}", alone=False, forget=lambda: None)

    def lengths_interact(self, model: LoadedModel) -> str:
        """Return why texts of different lengths in one batch change each other's numbers; "" if they do not.

        What is known from the configuration, without a pass of the model.
        """
        return ""

    def answers(self, model: LoadedModel, reader: Reader, rows: Sequence[Row], decoding: Decoding) -> list[str]:
        """Return the answer that a model generates to each row's question, without spaces around it.

        Only kinds that the evaluator `answers` applies to have it.
        """
        raise NotImplementedError(f"{self.noun} generates no answers")

    def embeddings(
        self,
        model: LoadedModel,
        reader: Reader,
        texts: Sequence[str] | None = None,
        pictures: Sequence[Any] | None = None,
    ) -> torch.Tensor:
        """Return the normalized embeddings [n, width] of texts or of pictures.

        Only kinds that the evaluators `retrieval` and `classification` apply to have it.
        """
        raise NotImplementedError(f"{self.noun} has no embeddings")

    def calibration(self, examples: Sequence[Example]) -> list[Batch]:
        """Return examples as calibration batches of the towers, without padding.

        Only kinds have it that are calibrated on the rows that they learn from, and not on running text.
        """
        raise NotImplementedError(f"{self.noun} is calibrated on text")

    def timed_inputs(self, model: LoadedModel, ids: torch.Tensor, before: ModelOutput | None) -> Inputs:
        """Return the inputs of a pass that reads prompts `ids` [B, T] or adds tokens [B, 1] after the pass `before`.

        Only kinds that the evaluator `cost` applies to have it.
        """
        raise NotImplementedError(f"{self.noun} writes no text")

    # Checks by fixed inputs

    @abstractmethod
    def probes(self, model: LoadedModel) -> list[Inputs]:
        """Return a few fixed inputs, on which a model is compared with and without its adapter or before merging."""

    @abstractmethod
    def outputs(self, model: LoadedModel, inputs: Inputs) -> torch.Tensor:
        """Return the model's output for the inputs, [..., width]: logits or embeddings."""


def named(name: str) -> ModelKind:
    """Return the kind called `name`."""
    return importlib.import_module(f"{__package__}.{KINDS[name]}").KIND


def of(config: PretrainedConfig | SimpleNamespace) -> ModelKind:
    """Return the kind of the models that have this configuration, or this content of a config.json."""
    return next(kind for kind in map(named, KINDS) if kind.fits(config))


def of_checkpoint(folder: str | Path) -> ModelKind:
    """Return the kind of the model in a folder, from its config.json alone."""
    return of(SimpleNamespace(**parsed((Path(folder) / "config.json").read_text(encoding="utf-8"))))
