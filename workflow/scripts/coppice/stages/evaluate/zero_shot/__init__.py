"""Zero-shot evaluation on lm-eval's official tasks."""

from coppice import models
from coppice.data.task_definitions import facts, official_source

from .tasks import measure, result, task

__all__ = ["facts", "language_model", "measure", "official_source", "result", "task"]


def language_model(model, tokenizer, engine, batch_size):
    """Return the `lm_eval.api.model.LM` that scores `model`. No other function chooses the engine.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        engine: "prefix-tree" for this package's engine, "lm-eval" for the harness's HF backend.
        batch_size: batch size of the harness's backend and of generation.
    """
    # lm-eval would assume 2048 tokens for a model whose configuration does not say it
    options = {"batch_size": batch_size, "max_length": models.context_length(model)}
    if engine == "prefix-tree":
        from .harness_model import PrefixTreeLM

        return PrefixTreeLM(pretrained=model, tokenizer=tokenizer, **options)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, **options)
