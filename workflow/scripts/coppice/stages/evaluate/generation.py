"""Generate a model's answers to a few questions, to be read in the report; no number depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice import models
from coppice.core.aliases import Record
from coppice.data import prompts
from coppice.models.tokenizing import ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coppice.models.kinds import LoadedModel


def answers(
    model: LoadedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], prompt: str, new_tokens: int
) -> list[Record]:
    """Return [{prompt, text}] with the greedy continuation of each question.

    The text is None if the question leaves no room in the model's context, or has no token for the tokenizer.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: list of strings.
        prompt: prompt format: alpaca, chat or none.
        new_tokens: largest number of tokens to generate per question.
    """
    import torch

    ends = ends_of(model, tokenizer)
    found = []
    for question in questions:
        text, special = prompts.format_question(question, prompt, tokenizer)
        ids = tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
        room = min(new_tokens, models.context_length(model) - ids.shape[1])
        if room < 1 or not ids.shape[1]:
            found.append({"prompt": question, "text": None})
            continue
        ids = ids.to(model.get_input_embeddings().weight.device)
        with torch.inference_mode():
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **({"eos_token_id": ends} if ends else {}),
            )
        new = generated[0, ids.shape[1] :].tolist()
        if new[-1] in ends:  # the tokenizer skips it only if it counts as one of its special tokens
            new.pop()
        answer = tokenizer.decode(new, skip_special_tokens=True).strip()
        found.append({"prompt": question, "text": answer})
    return found
