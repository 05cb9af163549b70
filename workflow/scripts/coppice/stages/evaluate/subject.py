"""The model under evaluation, loaded when it is first needed: a part that is finished needs none."""

import logging
import math

from coppice import models
from coppice.core.errors import CheckpointError

logger = logging.getLogger("coppice.evaluation")

PROBES, PROBE_TOKENS = 4, 64  # sequences of token ids, drawn once, on which logits are compared


class Subject:
    """A checkpoint (`models.Source`) with or without an adapter: its `model`, `tokenizer` and `language_model`."""

    def __init__(self, source, adapter=None):
        self.source, self.adapter = source, adapter
        self._model = self._tokenizer = self._lm = None
        self._merged = False

    @property
    def model(self):
        """The model with its adapter beside the weights, as it was trained."""
        if self._model is None or self._merged:
            self._model, self._merged = models.load(self.source, self.adapter), False
            models.check_vocabulary(self._model, self.tokenizer, self.source.path)
        return self._model

    @property
    def tokenizer(self):
        if self._tokenizer is None:
            self._tokenizer = models.load_tokenizer(self.source.path, self.source.trust_remote_code)
        return self._tokenizer

    def language_model(self, engine, batch_size):
        """What lm-eval's tasks ask; `engine` may fall back to the harness's own (see `engine_of`)."""
        if self._lm is None:
            from . import zero_shot

            self._lm = zero_shot.language_model(self.model, self.tokenizer, engine, batch_size)
        return self._lm

    def engine_of(self, engine):
        """The engine that really scored: a model that cannot take the prefix tree is left to the harness."""
        return engine if getattr(self._lm, "shares_prefixes", True) else "lm-eval"

    def sizes(self):
        """{parameters, adapter_parameters, adapter_effect}.

        CheckpointError where the adapter changes no logit, or a logit is no finite number.
        """
        whole = models.parameters(self.model)
        base = sum(p.numel() for name, p in self.model.named_parameters() if "lora_" not in name)
        facts = {"parameters": base, "adapter_parameters": whole - base, "adapter_effect": None}
        if self.adapter is None:
            return facts
        effect = self._difference(self._logits(), self._logits_without_adapter())
        if not math.isfinite(effect["max_logit_difference"]):
            raise models.broken(self.model, "its logits are no finite numbers")
        if not effect["max_logit_difference"]:
            raise CheckpointError(
                f"{self.adapter}: the adapter changes no logit of {self.source.path}: it is not applied, or it is empty"
            )
        return facts | {"adapter_effect": effect}

    def merge(self):
        """Merge the adapter into the weights for good and return how far the logits drift; the last use of the model.

        {max_logit_difference, mean_logit_difference, max_logit, tokens}, or {unsupported: reason}.
        """
        before, merged = self._logits(), None
        try:
            merged = self.model.merge_and_unload()
        except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            logger.warning("%s: the adapter cannot be merged into this base: %s", self.adapter, error)
            self._model = self._lm = None  # half of its layers may be merged
            return {"unsupported": str(error)}
        self._model, self._lm, self._merged = merged, None, True
        return self._difference(before, self._logits())

    def merged_model(self):
        """(model, whether an adapter is merged into it): the plain model that would be put to use."""
        if self.adapter is not None and not self._merged:
            self.merge()
        return (self._model, True) if self._merged else (self.model, False)

    def _probes(self):
        import torch

        rows = self._model.get_input_embeddings().weight.shape[0]
        length = min(PROBE_TOKENS, models.context_length(self._model))
        ids = torch.randint(rows, (PROBES, length), generator=torch.Generator().manual_seed(0))
        return ids.to(self._model.get_input_embeddings().weight.device)

    def _logits(self):
        """Logits [probes * tokens, vocabulary] of the model as it stands, on the CPU."""
        import torch

        model = self._model if self._model is not None else self.model
        with torch.inference_mode():
            rows = [model(input_ids=row[None], use_cache=False).logits[0].float().cpu() for row in self._probes()]
        return torch.cat(rows)

    def _logits_without_adapter(self):
        with self._model.disable_adapter():
            return self._logits()

    @staticmethod
    def _difference(first, second):
        apart = (first - second).abs()
        return {
            "max_logit_difference": float(apart.max()),
            "mean_logit_difference": float(apart.mean()),
            "max_logit": float(first.abs().max()),
            "tokens": len(first),
        }
