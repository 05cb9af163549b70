"""Generate a model's answers to a few questions, to be read in the report; no number depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice import models
from coppice.core.aliases import Record
from coppice.data import prompts
from coppice.models import continuing
from coppice.models.kinds import Decoding

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
    asked = []
    for question in questions:
        text, special = prompts.format_question(question, prompt, tokenizer)
        asked.append(continuing.Question(tokenizer(text, add_special_tokens=special).input_ids))
    decoding = Decoding(new_tokens=new_tokens)
    found = continuing.continuations(model, tokenizer, asked, decoding, models.context_length(model))
    return [{"prompt": question, "text": text} for question, text in zip(questions, found, strict=True)]
