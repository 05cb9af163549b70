"""Read rows that mention pictures as chats in which `<image>` marks the place of each picture.

Chats come as `messages` (role and content, whose text marks pictures as LLaMA-Factory does, or whose content is a list
of parts as chat templates take it) or as LLaVA's `conversations` (from and value). If no place is marked, the pictures
come before the first question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from coppice.core.aliases import Record
from coppice.core.errors import DataError

Turn = dict[str, Any]  # {role, content}; the content is a text, or a list of parts for a chat template

COLUMN = "images"  # of a prepared row: a list of {path, sha256, width, height}
MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}  # names of LLaVA's `from` -> those of chat templates
QUESTIONS = ("question", "prompt")
CAPTION_PROMPT = "Describe the image."  # what a row {image, caption} asks


def digests(row: Record) -> list[str]:
    """Return the digests of a prepared row's pictures; none if it has no pictures."""
    cell = row.get(COLUMN)
    return [one["sha256"] for one in cell if isinstance(one, dict)] if isinstance(cell, list) else []


def conversation(row: Record) -> list[Turn]:
    """Return the turns of a chat row, {role, content}, with pictures marked in their texts."""
    found = []
    for turn in row.get("messages") or row.get("conversations") or []:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        found.append({"role": ROLES.get(role, role), "content": _text(content)})
    return found


def _text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the text of a turn; content: a text, or parts {type: image} and {type: text, text}."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [MARK if part["type"] == "image" else part["text"] for part in content]
    return "".join(parts)


def question(row: Record) -> str:
    """Return what a row with one question asks, which is not a chat."""
    asked = [row[column] for column in QUESTIONS if row.get(column)]
    return asked[0] if asked else CAPTION_PROMPT


def marked(turns: Sequence[Turn], pictures: int, where: str) -> list[Turn]:
    """Return the turns with one mark for each of a number of pictures.

    Raises:
        DataError: The turns mark another number of pictures, or an answer marks one.
    """
    marks = sum(turn["content"].count(MARK) for turn in turns)
    first = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), None)
    if not marks and pictures and first is not None:
        turns = [dict(turn) for turn in turns]
        turns[first]["content"] = MARK * pictures + turns[first]["content"]
        marks = pictures
    if marks != pictures:
        raise DataError(
            f"{where}: its text marks {marks} pictures with {MARK}, but the row has {pictures}. Write one mark for "
            "each picture, or none."
        )
    if any(MARK in turn["content"] for turn in turns if turn["role"] == "assistant"):
        raise DataError(f"{where}: an answer contains {MARK}, but only questions can have pictures. Correct the row.")
    return list(turns)


def with_parts(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns as a chat template takes them: a text with marks becomes a list of parts."""
    return [turn | {"content": _parts(turn["content"])} if MARK in turn["content"] else turn for turn in turns]


def _parts(text: str) -> list[Record]:
    """Return {type: image} and {type: text} parts, without the line breaks beside marks: templates set pictures."""
    found: list[Record] = []
    for place, piece in enumerate(re.split(rf"\n?{MARK}\n?", text)):
        found += [{"type": "image"}] if place else []
        found += [{"type": "text", "text": piece}] if piece else []
    return found
