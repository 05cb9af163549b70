"""The model under evaluation, loaded only when first needed, because finished parts need no model."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from coppice import models
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CheckpointError
from coppice.models import adapters, kinds, sparsity

if TYPE_CHECKING:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

    from coppice.models.kinds import LoadedModel

logger = logging.getLogger("coppice.evaluation")


class Subject:
    """A checkpoint (`models.Source`) with or without an adapter, as `model`, `tokenizer` and `language_model`."""

    def __init__(self, source: models.Source, adapter: PathLike | None = None) -> None:
        """Take the checkpoint and the folder of an adapter, without loading them yet."""
        self.source, self.adapter = source, adapter
        self._model: LoadedModel | None = None
        self._reader: models.Reader | None = None
        self._lm: HFLM | None = None
        self._merged = False

    @property
    def model(self) -> LoadedModel:
        """The model with its adapter beside the weights, as in training. Loads it if it is missing or merged."""
        if self._model is None or self._merged:
            self._model, self._merged = models.load(self.source, self.adapter), False
            models.check_vocabulary(self._model, self.tokenizer, self.source.path)
        return self._model

    @property
    def reader(self) -> models.Reader:
        """The tokenizer of the checkpoint and, if the model sees, its image processor."""
        if self._reader is None:
            self._reader = self.source.reader()
        return self._reader

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint."""
        return self.reader.tokenizer

    @property
    def keeps_zeros(self) -> bool:
        """Whether merging the adapter keeps the zeros of pruned weights: unless its training says `off`."""
        return adapters.recorded_settings(self.adapter).get("keep_sparsity", "mask") != "off"

    def language_model(self, engine: str, batch_size: int) -> HFLM:
        """Return the model as lm-eval's tasks use it. May fall back to the harness's backend (see `engine_of`)."""
        if self._lm is None:
            from . import zero_shot

            self._lm = zero_shot.language_model(self.model, self.tokenizer, engine, batch_size)
        return self._lm

    def engine_of(self, engine: str) -> str:
        """Return the engine that really scored: "lm-eval" if the model cannot take the prefix tree's mask."""
        return engine if getattr(self._lm, "shares_prefixes", True) else "lm-eval"

    def sizes(self) -> Record:
        """Return {parameters, adapter_parameters, adapter_effect, sparsity (of the weights, without the adapter)}.

        Raises:
            CheckpointError: the adapter changes no logit, or a logit is not finite.
        """
        added = adapters.parameters(self.model)
        base = models.parameters(self.model) - added
        facts = {"parameters": base, "adapter_parameters": added, "adapter_effect": None}
        facts["sparsity"] = sparsity.measure(self.model)
        if self.adapter is None:
            return facts
        effect = self._difference(self._logits(), self._logits_without_adapter())
        if not math.isfinite(effect["max_logit_difference"]):
            raise models.broken(self.model, "its logits are no finite numbers")
        if not effect["max_logit_difference"]:
            raise CheckpointError(
                f"{self.adapter}: the adapter changes no logit of {self.source.path}, so it is empty or does not fit "
                "this model. Train it on this model."
            )
        return facts | {"adapter_effect": effect}

    def merge(self) -> Record:
        """Merge the adapter into the weights and return how far this moves the logits.

        Merging cannot be undone: a later use of `model` loads the checkpoint again.

        Returns:
            {max_logit_difference, mean_logit_difference, max_logit, tokens}, or {unsupported: reason}.
        """
        before, merged = self._logits(), None
        try:
            merged = sparsity.merge(self.model, self.keeps_zeros)
        except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            logger.warning("%s: the adapter cannot be merged into this base: %s", self.adapter, error)
            self._model = self._lm = None  # some layers may already be merged, so the model must not be used again
            return {"unsupported": str(error)}
        self._model, self._lm, self._merged = merged, None, True
        return self._difference(before, self._logits())

    def merged_model(self) -> tuple[LoadedModel, bool]:
        """Return (the plain model as it would be deployed, True if an adapter is merged into it)."""
        if self.adapter is not None and not self._merged:
            self.merge()
        return (self._model, True) if self._merged else (self.model, False)

    def _logits(self) -> torch.Tensor:
        """Return the outputs [probes * tokens, width] of the model in its present state, float32 on the CPU."""
        import torch

        # Not `self.model`, which would load the checkpoint again once the adapter is merged.
        model = self._model if self._model is not None else self.model
        kind = kinds.of(model.config)
        with torch.inference_mode():
            found = [kind.outputs(model, probe).float().cpu().flatten(0, -2) for probe in kind.probes(model)]
        return torch.cat(found)

    def _logits_without_adapter(self) -> torch.Tensor:
        with self._model.disable_adapter():
            return self._logits()

    @staticmethod
    def _difference(first: torch.Tensor, second: torch.Tensor) -> Record:
        difference = (first - second).abs()
        return {
            "max_logit_difference": float(difference.max()),
            "mean_logit_difference": float(difference.mean()),
            "max_logit": float(first.abs().max()),
            "tokens": len(first),
        }
