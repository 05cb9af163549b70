"""Check, when a model is taken in, that it can do what the study asks of it, before anything computes with it.

`files` checks that the files are complete. This module loads the configuration and the tokenizer, without the weights,
and compares them with each other and with the study's settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from coppice.core.errors import CheckpointError, SettingsError

from . import kinds, pruned_shapes, readers, tokenizing
from .library_errors import described
from .loading import NO_LENGTH

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger("coppice.models")

# How the names of input embeddings end, in the architectures of transformers
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "embeddings",
    "embedding",
    "tok_embeddings",
    "shared",
)
SHOWN = 5


@dataclass(frozen=True)
class Needs:
    """What a study asks of a model besides its weights.

    Attributes:
        context_length: `models.X.context_length`.
        eos_token: `models.X.eos_token`.
        trust_remote_code: whether code that comes with the model may run.
        prompt: the prompt format in which the model is asked: alpaca, chat or none.
        bos: whether all perplexity windows begin with BOS.
        kind: the name of its kind; empty: any.
    """

    context_length: int | None = None
    eos_token: str | None = None
    trust_remote_code: bool = False
    prompt: str = "none"
    bos: bool = False
    kind: str = ""


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Name the model and its keys in the errors of the checks inside."""
    try:
        yield
    except (CheckpointError, SettingsError) as error:
        text = str(error).replace("models.X.", f"models.{name}.")
        raise type(error)(f"models.{name}: {text}") from error


def check(folder: str | Path, needs: Needs) -> dict[str, Any]:
    """Return facts about a model's context length and tokenizer, for its record, and log what a user should know.

    Returns:
        {context_length, tokenizer: {tokens, rows (of the embedding), bos, eos, pad}, notices}.

    Raises:
        SettingsError: the length or the end-of-sequence token is not known, or the tokenizer lacks BOS and needs it.
        CheckpointError: the configuration or the tokenizer does not load, or they do not fit together.
    """
    check_kind(folder, needs.kind)
    config = _configuration(folder, needs.trust_remote_code)
    length = _length(folder, config, needs.context_length)
    tokenizer = tokenizing.load_tokenizer(folder, needs.trust_remote_code, needs.eos_token)
    tokenizing.check_end(tokenizer, folder)
    if kinds.of(config).sees:
        _check_sight(folder, readers.seeing(folder, tokenizer), needs.prompt)
    if needs.bos and tokenizer.bos_token_id is None:
        raise SettingsError(
            f"{folder}: evaluate.perplexity begins every window with BOS, but the model's tokenizer has no BOS token. "
            "Set evaluate.perplexity.bos to once or none."
        )
    rows, tokens = embedding_rows(folder, config), len(tokenizer)
    without = tokenizing.check_rows(tokenizer, rows, folder) if rows else []
    notices = tokenizing.bos_notices(tokenizer, needs.prompt)
    if without:
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        notices.append(
            f"these special tokens have no row in the embedding ({rows} rows), which is harmless as long as no text "
            f"contains them: {', '.join(without[:SHOWN])}{more}"
        )
    for notice in notices:
        logger.warning("%s: %s", folder, notice)
    named = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad")}
    return {"context_length": length, "tokenizer": {"tokens": tokens, "rows": rows, **named}, "notices": notices}


def _check_sight(folder: str | Path, reader: readers.Reader, prompt: str) -> None:
    """Raise SettingsError if chats with pictures cannot be written for the model."""
    if prompt != "chat" or reader.placeholder is None or not reader.tokenizer.chat_template:
        return
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    try:
        found = reader.tokenizer.apply_chat_template(chat, tokenize=False).count(reader.placeholder.token)
        reason = f"writes {found} times {reader.placeholder.token} for one picture"
    except (jinja2.TemplateError, TypeError) as error:
        found, reason = 0, f"takes no picture ({error})"
    if found != 1:
        raise SettingsError(
            f"{folder}: its chat template {reason}. Put the chat template of the original model's processor there "
            "(chat_template.jinja), or set models.X.prompt to none."
        )


def check_kind(folder: str | Path, wanted: str, name: str = "X") -> None:
    """Raise SettingsError if a checkpoint is of another kind than its model in the configuration.

    Args:
        folder: the checkpoint, of which the config.json is enough.
        wanted: the name of the kind; empty: any.
        name: of the model, for the message.
    """
    found = kinds.of_checkpoint(folder)
    if wanted not in ("", found.name):
        raise SettingsError(
            f"{folder}: its config.json is that of {found.noun}, but the study takes it for "
            f"{kinds.named(wanted).noun}. Set models.{name}.kind to {found.name}."
        )


def _configuration(folder: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers does not check every value, so a bad one can raise anything
        raise CheckpointError(f"{folder}: its config.json does not load: {described(error)}") from error


def _length(folder: str | Path, config: PretrainedConfig, given: int | None) -> int:
    """Return the most tokens that the model takes, as the user says or else as its configuration says."""
    own = kinds.of(config).context_length(config)
    if given is None and own is None:
        raise SettingsError(NO_LENGTH.format(folder))
    if given is not None and own is not None and given > own:
        raise SettingsError(
            f"{folder}: models.X.context_length is {given}, but its config.json says {own}, and positions beyond that "
            "may not exist. Lower the setting."
        )
    return given or own


def embedding_rows(folder: str | Path, config: PretrainedConfig) -> int | None:
    """Return the number of rows of the input embedding: from the weights, else `vocab_size`; None if unknown."""
    text = config.get_text_config()
    for name, shape in (pruned_shapes.tensor_shapes(folder) or {}).items():
        if (
            name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS
            and name.endswith(".weight")
            and len(shape) == 2
        ):
            return shape[0]
    return getattr(text, "vocab_size", None)
