"""Generate a model's answers to a few questions, to be read in the report; no number depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice import models
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import SettingsError
from coppice.data import picture_rows, pictures, prompts
from coppice.models import continuing, kinds
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


def answers_of_kind(
    model: LoadedModel,
    reader: models.Reader,
    questions: Sequence[str],
    prompt: str,
    new_tokens: int,
    *,
    files: Sequence[PathLike] = (),
) -> list[Record]:
    """Return [{prompt, text}] with the greedy answer to each question, as the model's kind answers rows of data.

    Args:
        model: a model whose kind answers rows.
        reader: its tokenizer and image processor.
        questions: list of strings; `<image>` marks the places of the pictures.
        prompt: prompt format: alpaca, chat or none.
        new_tokens: largest number of tokens to generate per question.
        files: pictures that belong to every question, for a model that sees.

    Raises:
        SettingsError: The model reads no pictures, or a file is no picture that can be used.
    """
    kind = kinds.of(model.config)
    if files and not (kind.sees and reader.placeholder):
        raise SettingsError(f"--image: {kind.noun} does not answer questions about pictures. Remove the option.")
    shown = [_facts_of(file) for file in files]
    # a row without an answer gives no segments, so use a dummy one, which is no part of the question
    if files:
        form, content, name = "image-answer", {picture_rows.COLUMN: shown, "answer": "."}, "question"
    elif prompt == "none":
        form, content, name = "completion", {"completion": "."}, "prompt"
    else:
        form, content, name = "instruction", {"input": "", "output": "."}, "instruction"
    album = pictures.Album(Path.cwd(), reader.placeholder) if files else None
    formatter = prompts.Formatter(form, prompt, reader.tokenizer, album)
    rows = [formatter.question(content | {name: question}, f"--prompt {question!r}") for question in questions]
    found = kind.answers(model, reader, rows, Decoding(new_tokens=new_tokens))
    return [{"prompt": question, "text": text} for question, text in zip(questions, found, strict=True)]


def _facts_of(file: PathLike) -> Record:
    try:
        return pictures.facts_of(str(Path(file).absolute()), Path(file).read_bytes())[0]
    except OSError as error:
        raise SettingsError(f"--image: {file} cannot be read ({error.strerror}). Name another file.") from error
    except pictures.Unusable as error:
        raise SettingsError(f"--image: {file} {error}. Name another file.") from error
