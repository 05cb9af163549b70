"""Zero-shot evaluation on lm-eval's official tasks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from coppice import models
from coppice.data.task_definitions import facts, official_source

from .tasks import METHOD, measure, result, task

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

    from coppice.models.kinds import LoadedModel

logger = logging.getLogger("coppice.zero_shot")

__all__ = ["METHOD", "facts", "language_model", "measure", "official_source", "result", "task"]


def language_model(model: LoadedModel, tokenizer: PreTrainedTokenizerBase, engine: str, batch_size: int) -> HFLM:
    """Return the `lm_eval.api.model.LM` that scores `model`. No other function chooses the engine.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        engine: "prefix-tree" for this package's engine, "lm-eval" for the harness's HF backend.
        batch_size: batch size of the harness's backend and of generation.
    """
    # lm-eval would assume 2048 tokens for a model whose configuration does not say it
    options = {"batch_size": batch_size, "max_length": models.context_length(model)}
    if engine == "prefix-tree":
        from .harness_model import PrefixTreeLM

        return PrefixTreeLM(pretrained=model, tokenizer=tokenizer, **options)
    from coppice.models import kinds

    from .merged_tokens import CheckedLM

    reason = kinds.of(model.config).lengths_interact(model)
    if reason:
        options = options | {"batch_size": 1}
    lm = CheckedLM(pretrained=model, tokenizer=tokenizer, **options)
    if reason and batch_size > 1:
        lm.warnings.append(f"lm-eval's backend scored the tasks one text at a time: {reason}")
        logger.warning("%s", lm.warnings[-1])
    return lm
