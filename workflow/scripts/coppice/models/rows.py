"""A row of a data set as a model reads it: the pieces of its text, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Segment:
    """A piece of an example.

    Attributes:
        text: its text.
        learned: True if the loss covers it (a response) and False if not (a prompt).
        control: whether the text is the name of one control token. The texts between control tokens are encoded each
            by itself; other rows are encoded as one text.
        loses: what a row with control tokens loses if it is too long: "all" (this piece first), "start" or "end" of it.
    """

    text: str
    learned: bool
    control: bool = False
    loses: Literal["", "all", "start", "end"] = ""


class Picture(Protocol):
    """A picture of a row: its size in pixels, a digest of its bytes, and the picture itself, read on demand."""

    path: str
    sha256: str
    width: int
    height: int

    def open(self) -> Image:
        """Return the picture in RGB."""


@dataclass(frozen=True)
class Row:
    """A row of a data set, formatted for a model.

    Attributes:
        segments: its text; empty if there is nothing to learn from. The last one is the answer.
        ends: whether an end-of-sequence token follows the text.
        special_tokens: whether the tokenizer's special tokens go around the text. A chat template contains them.
        divisible: whether a long text may become several examples (plain text) or is cut off (a response).
        content: the columns of the row, for kinds that read more than text.
        references: every right answer to the row. Training rows have one, and running text has none.
        pictures: what a model that sees reads with the text, in the order in which the text mentions them.
        kind: the kind of the row, a key of `data.prompts.KINDS`.
    """

    segments: Sequence[Segment]
    ends: bool
    special_tokens: bool
    divisible: bool
    content: Mapping[str, Any]
    references: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    kind: str = "text"

    @property
    def question(self) -> str:
        """The text that a model is asked: all that comes before the answer."""
        return "".join(segment.text for segment in self.segments[:-1])

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts at which the answer ends.

        A single line (of `coppice build-code-data`) ends where the line does, and a program where the function does
        that the prompt begins (Chen et al. 2021), unless it is the answer in a chat.
        """
        if self.kind == "program" and self.special_tokens:
            return ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
        return ("\n",) if self.kind == "fim" and self.content.get("kind") == "line" else ()
