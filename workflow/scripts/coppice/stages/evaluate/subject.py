"""The model under evaluation, loaded only when first needed, because finished parts need no model."""

import logging
import math

from coppice import models
from coppice.core.errors import CheckpointError
from coppice.models import kinds

logger = logging.getLogger("coppice.evaluation")


class Subject:
    """A checkpoint (`models.Source`) with or without an adapter, as `model`, `tokenizer` and `language_model`."""

    def __init__(self, source, adapter=None):
        self.source, self.adapter = source, adapter
        self._model = self._tokenizer = self._lm = None
        self._merged = False

    @property
    def model(self):
        """The model with its adapter beside the weights, as in training. Loads it if it is missing or merged."""
        if self._model is None or self._merged:
            self._model, self._merged = models.load(self.source, self.adapter), False
            models.check_vocabulary(self._model, self.tokenizer, self.source.path)
        return self._model

    @property
    def tokenizer(self):
        """The tokenizer of the checkpoint."""
        if self._tokenizer is None:
            self._tokenizer = self.source.tokenizer()
        return self._tokenizer

    def language_model(self, engine, batch_size):
        """Return the model as lm-eval's tasks use it. May fall back to the harness's backend (see `engine_of`)."""
        if self._lm is None:
            from . import zero_shot

            self._lm = zero_shot.language_model(self.model, self.tokenizer, engine, batch_size)
        return self._lm

    def engine_of(self, engine):
        """Return the engine that really scored: "lm-eval" if the model cannot take the prefix tree's mask."""
        return engine if getattr(self._lm, "shares_prefixes", True) else "lm-eval"

    def sizes(self):
        """Return {parameters, adapter_parameters, adapter_effect}.

        Raises:
            CheckpointError: the adapter changes no logit, or a logit is not finite.
        """
        total = models.parameters(self.model)
        base = sum(p.numel() for name, p in self.model.named_parameters() if "lora_" not in name)
        facts = {"parameters": base, "adapter_parameters": total - base, "adapter_effect": None}
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

    def merge(self):
        """Merge the adapter into the weights and return how far this moves the logits.

        Merging cannot be undone: a later use of `model` loads the checkpoint again.

        Returns:
            {max_logit_difference, mean_logit_difference, max_logit, tokens}, or {unsupported: reason}.
        """
        before, merged = self._logits(), None
        try:
            merged = self.model.merge_and_unload()
        except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            logger.warning("%s: the adapter cannot be merged into this base: %s", self.adapter, error)
            self._model = self._lm = None  # some layers may already be merged, so the model must not be used again
            return {"unsupported": str(error)}
        self._model, self._lm, self._merged = merged, None, True
        return self._difference(before, self._logits())

    def merged_model(self):
        """Return (the plain model as it would be deployed, True if an adapter is merged into it)."""
        if self.adapter is not None and not self._merged:
            self.merge()
        return (self._model, True) if self._merged else (self.model, False)

    def _logits(self):
        """Return the outputs [probes * tokens, width] of the model in its present state, float32 on the CPU."""
        import torch

        # Not `self.model`, which would load the checkpoint again once the adapter is merged.
        model = self._model if self._model is not None else self.model
        kind = kinds.of(model.config)
        with torch.inference_mode():
            found = [kind.outputs(model, probe).float().cpu().flatten(0, -2) for probe in kind.probes(model)]
        return torch.cat(found)

    def _logits_without_adapter(self):
        with self._model.disable_adapter():
            return self._logits()

    @staticmethod
    def _difference(first, second):
        difference = (first - second).abs()
        return {
            "max_logit_difference": float(difference.max()),
            "mean_logit_difference": float(difference.mean()),
            "max_logit": float(first.abs().max()),
            "tokens": len(first),
        }
