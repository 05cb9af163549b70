"""Zero-shot evaluation by lm-eval's official tasks."""

from coppice.data.task_definitions import facts, official_source

from .tasks import measure, result, task

__all__ = ["facts", "language_model", "measure", "official_source", "result", "task"]


def language_model(model, tokenizer, engine, batch_size):
    """The `lm_eval.api.model.LM` that scores `model`: the one function that decides which engine does.

    engine: "prefix-tree", this package's own, or "lm-eval", the harness's HF backend.
    """
    if engine == "prefix-tree":
        from .harness_model import PrefixTreeLM

        return PrefixTreeLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
