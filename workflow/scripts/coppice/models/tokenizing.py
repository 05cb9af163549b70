"""Load a checkpoint's tokenizer, and find out whether its tokens fit the model and what the study does with them.

Some tokenizers lack an end-of-sequence token, begin chats with two BOS tokens or have tokens without a row in the
embedding. Each of these is harmless for some studies and breaks others late, so `intake` looks for them when a model is
taken in.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from coppice.core.errors import CheckpointError, SettingsError

from .library_errors import described

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from .kinds import LoadedModel

logger = logging.getLogger("coppice.models")

SHOWN = 5  # tokens that a message names
NOT_AN_END = ("pad_token", "unk_token", "mask_token")  # special tokens that no text ends with


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint folder; it pads with its end-of-sequence token if it has no padding token.

    Args:
        path: the folder.
        trust_remote_code: whether to run code that comes with it.
        eos_token: the end-of-sequence token, in place of the tokenizer's own.

    Raises:
        CheckpointError: it does not load.
        SettingsError: it has no token `eos_token`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers do not check their files either
        raise CheckpointError(f"{path}: its tokenizer does not load: {described(error)}") from error
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():  # setting it would add a token, which has no row in the embedding
            raise SettingsError(
                f"{path}: models.X.eos_token is '{eos_token}', which is not a token of this tokenizer. "
                f"{_ends(tokenizer)}"
            )
        tokenizer.eos_token = eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_end(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise SettingsError if the tokenizer has no end-of-sequence token, which teaches a model to stop."""
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            f"{path}: its tokenizer has no end-of-sequence token, with which fine-tuning ends each answer. Set "
            f"models.X.eos_token (coppice finetune: --eos-token) to one of its tokens. {_ends(tokenizer)}"
        )


def _ends(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sentence with the special tokens that may end a text."""
    no_ends = {getattr(tokenizer, name) for name in NOT_AN_END}
    found = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [f"'{token}'" for token in found if token not in no_ends]
    if not found:
        return "It has no special token that fits; choose the token after which its training texts end."
    return f"Its special tokens are {', '.join(found[:SHOWN])}{' and others' if len(found) > SHOWN else ''}."


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Reject a tokenizer whose texts have ids for which `model` has no embedding row.

    More rows than tokens are normal. A special token without a row is accepted, because hardly any text contains it; if
    it is the padding token, the tokenizer pads with its end-of-sequence token instead.
    """
    text = getattr(model, "text_model", model)  # only its text encoder can say what a CLIP's embeddings are
    rows = text.get_input_embeddings().weight.shape[0]
    check_rows(tokenizer, rows, path)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: int, path: str | Path) -> list[str]:
    """Return the special tokens without a row in an embedding of `rows` rows; raise CheckpointError for other tokens.

    The tokens that begin, end or stand in for a text must have a row, too.
    """
    beyond = {text: place for text, place in tokenizer.get_vocab().items() if place >= rows}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    fed = sorted((text for text in beyond if text not in special or text in used), key=beyond.__getitem__)
    if fed:
        named = ", ".join(f"'{text}' ({beyond[text]})" for text in fed[:SHOWN])
        raise CheckpointError(
            f"{path}: its tokenizer has ids up to {max(beyond.values())}, but its embedding only {rows} rows, so "
            f"{len(fed)} of its tokens have none: {named}{', ...' if len(fed) > SHOWN else ''}. Use the tokenizer that "
            "belongs to these weights, or leave these tokens out of it."
        )
    return sorted(beyond, key=beyond.__getitem__)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer itself puts its BOS token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def bos_notices(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Return what a user should know about the BOS token at the beginning of texts and chats; usually nothing.

    prompt: the prompt format; chat templates matter only if it is chat.
    """
    bos = tokenizer.bos_token_id
    if bos is None or prompt != "chat" or not tokenizer.chat_template:
        return []
    try:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        return [f"its chat template does not accept a chat of one message: {error}"]
    # as in training and generation: what the template wrote is encoded without further special tokens
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    if ids[:2] == [bos, bos]:
        return [f"its chat template begins chats with two BOS tokens ('{tokenizer.bos_token}'); correct the template"]
    adds = begins_with_bos(tokenizer)
    if adds and ids[:1] == [bos]:
        return ["both its chat template and its tokenizer add a BOS token; chats get one, the template's"]
    if adds:
        return ["its tokenizer begins texts with a BOS token, but its chat template begins chats with none"]
    return []


def ends_of(model: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: those of the checkpoint, and the one that fine-tuning appends.

    The second is missing in the checkpoint if the user names it (`models.X.eos_token`).
    """
    own = model.generation_config.eos_token_id
    every = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return [token for token in dict.fromkeys(every) if token is not None]
