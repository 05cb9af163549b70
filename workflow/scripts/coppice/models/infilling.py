"""Fill-in-the-middle: the control tokens by which a code model is asked for the text between a prefix and a suffix.

Models differ in the names of these tokens, and agree on the order prefix, suffix, middle (PSM) of Bavarian et al. 2022.
The tokens are given by their ids. Texts around them are encoded so that they never become control tokens, whatever they
spell, and without the space that SentencePiece puts before a text: the suffix and the middle continue one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coppice.core.errors import DataError, SettingsError

from .rows import Segment
from .tokenizing import begins_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 8  # of a token, at most, on average: of code it is 3 or 4. What lies further away is not tokenized.
ANCHOR = "☺"  # no tokenizer joins it with what follows
SPACES = ("▁", "Ġ")  # how tokenizers write the space that they put before a text
# An added token of this form is a control token even if the tokenizer's files do not call it special (Qwen2.5-Coder's
# are not). Other added tokens are text: runs of spaces, single letters.
CONTROL = re.compile(r"▁?<[^\s<>]+>|\[[A-Z_]+\]")


@dataclass(frozen=True)
class Tokens:
    """The control tokens of a model, by name.

    Attributes:
        prefix: before the prefix.
        suffix: before the suffix.
        middle: before the middle.
        end: after the middle, if it is not the end-of-sequence token.
        repository: before the name of a repository, and `file` before each of its files; the model may lack them.
        others: further tokens after which no answer goes on.
    """

    prefix: str
    suffix: str
    middle: str
    end: str | None = None
    repository: str = ""
    file: str = ""
    others: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The tokens after which no answer goes on."""
        every = (self.prefix, self.suffix, self.middle, self.end, self.repository, self.file, *self.others)
        return tuple(name for name in every if name)


FORMS = (
    # Qwen2.5-Coder and Qwen3-Coder; CodeGemma and Granite have the first three
    Tokens(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", None, "<|repo_name|>", "<|file_sep|>", ("<|fim_pad|>",)
    ),
    # StarCoder2; StarCoder has the first three
    Tokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>", None, "<repo_name>", "<file_sep>", ("<fim_pad>",)),
    Tokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Tokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    Tokens("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # CodeLlama
)


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the control tokens of a tokenizer; raise SettingsError if it has none."""
    vocabulary = tokenizer.get_vocab()
    for form in FORMS:
        if all(name in vocabulary for name in (form.prefix, form.suffix, form.middle)):
            optional = {"repository": form.repository, "file": form.file}
            known = {key: name if name in vocabulary else "" for key, name in optional.items()}
            return replace(form, **known, others=tuple(name for name in form.others if name in vocabulary))
    raise SettingsError(
        "the model's tokenizer has no tokens for filling in the middle (such as <|fim_prefix|>), so it cannot learn "
        "from rows with prefix, middle and suffix. Take a model that has them, or let it continue the prefix: set "
        "datasets.X.columns to {prompt: prefix, completion: middle}."
    )


def segments(row: Mapping[str, object], answer: str, tokens: Tokens) -> list[Segment]:
    """Return a row {prefix, suffix} (and context, repo, path) with its answer as a model reads it.

    `context` is a text, or a list of files {path, text} of the same repository. It comes first and is cut first.
    """
    context, prefix, suffix = row.get("context") or "", row["prefix"] or "", row["suffix"] or ""
    before: list[Segment] = []
    if isinstance(context, str):
        before = [_context(context)]
    elif tokens.file:
        if tokens.repository and row.get("repo"):
            before = [_context(tokens.repository, control=True), _context(f"{row['repo']}\n")]
        for file in context:
            before += [_context(tokens.file, control=True), _context(f"{file['path']}\n{file['text']}\n")]
        before += [_context(tokens.file, control=True), _context(f"{row.get('path') or ''}\n")] if before else []
    else:
        before = [_context("".join(f"# {file['path']}\n{file['text']}\n" for file in context))]
    found = [
        *(segment for segment in before if segment.text),
        Segment(tokens.prefix, False, control=True),
        Segment(prefix, False, loses="start"),
        Segment(tokens.suffix, False, control=True),
        Segment(suffix, False, loses="end"),
        Segment(tokens.middle, False, control=True),
        Segment(answer, True),
    ]
    return [*found, Segment(tokens.end, True, control=True)] if tokens.end else found


def _context(text: str, control: bool = False) -> Segment:
    return Segment(text, False, control=control, loses="all")


def is_infilling(row: Sequence[Segment]) -> bool:
    """Return whether segments hold control tokens, so that `Encoder` must encode them."""
    return any(segment.control for segment in row)


class Encoder:
    """Encodes the segments of rows, whose texts it tokenizes in one call.

    Args:
        rows: the segments of each row.
        tokenizer: a fast tokenizer.
        room: the most tokens of a row.

    Raises:
        DataError: A text becomes a control token all the same.
    """

    def __init__(self, rows: Iterable[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        """Tokenize the texts."""
        self.tokenizer, self.room, added = tokenizer, room, tokenizer.added_tokens_decoder
        names = {token.content for token in added.values() if token.special or CONTROL.fullmatch(token.content)}
        self.control = {place: token.content for place, token in added.items() if token.content in names}
        # the first letter alone is consumed, so that names which overlap are found
        firsts = {name[0]: [other[1:] for other in names if other[0] == name[0]] for name in names}
        forms = (f"{re.escape(first)}(?={'|'.join(map(re.escape, rest))})" for first, rest in firsts.items())
        self.spelled = re.compile("|".join(forms) or "(?!)")
        self.start = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
        texts = {part for row in rows for one in row if not one.control for part in self._parts(one)}
        self.found = self._tokenized(sorted(texts))

    def ids(self, row: Sequence[Segment]) -> list[list[int]] | None:
        """Return the token ids of each segment, with the tokenizer's BOS before the first one.

        If they are too many, segments lose tokens as they say: first those that may lose all, then prefix and suffix,
        of which each keeps at least half of what is left for both, if it has that many. Return None if what must stay
        is too long.
        """
        pieces = [self._ids(segment) for segment in row]
        excess = sum(map(len, pieces)) + len(self.start) - self.room
        for place, segment in enumerate(row):
            if segment.loses == "all" and excess > 0:
                cut = min(excess, len(pieces[place]))
                pieces[place], excess = pieces[place][cut:], excess - cut
        if excess > 0:
            sides = {segment.loses: place for place, segment in enumerate(row)}
            start, end = sides["start"], sides["end"]
            left = len(pieces[start]) + len(pieces[end]) - excess
            if left < 0:
                return None
            kept = min(len(pieces[end]), max(left // 2, left - len(pieces[start])))
            pieces[end] = pieces[end][:kept]
            pieces[start] = pieces[start][len(pieces[start]) - (left - kept) :]
        return [self.start + pieces[0], *pieces[1:]]

    def _ids(self, segment: Segment) -> list[int]:
        if segment.control:
            return [self.tokenizer.convert_tokens_to_ids(segment.text)]
        return [token for part in self._parts(segment) for token in self.found[part]]

    def _parts(self, segment: Segment) -> list[str]:
        """Return a text in parts, cut after the first letter of each control token that it spells."""
        text, most = segment.text, CHARACTERS * self.room
        if segment.loses:
            text = text[:most] if segment.loses == "end" else text[max(0, len(text) - most) :]
        cuts = [match.end() for match in self.spelled.finditer(text)]
        return [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)]) if stop > start]

    def _tokenized(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Return the token ids of each text, which continues another one."""
        if not texts:
            return {}
        options = {"add_special_tokens": False, "verbose": False}
        first = self.tokenizer("a", **options)["input_ids"][:1]
        adds_space = self.tokenizer.convert_ids_to_tokens(first)[0].startswith(SPACES)
        lead = ANCHOR if adds_space else ""
        encoded = self.tokenizer([lead + text for text in texts], return_offsets_mapping=True, **options)
        found = {}
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            found[text] = [token for token, (_, stop) in zip(ids, offsets, strict=True) if stop > len(lead)]
            if wrong := self.control.keys() & set(found[text]):
                raise DataError(
                    f"a text becomes the control token '{self.control[wrong.pop()]}' of the model's tokenizer. Leave "
                    "rows that spell it out of the data set."
                )
        return found
