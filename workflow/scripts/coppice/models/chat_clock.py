"""Fix the day that a chat template reads, so that a prompt is the same text on every day.

Templates of recent models begin with today's date (`strftime_now`, a function that transformers gives to every
template). A training that resumes tomorrow, or an evaluation of next week, would see other prompts. transformers takes
no function from a caller, so the template itself is given one of that name, a macro, in each call. What a tokenizer
saves stays as it is.
"""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from coppice.core.aliases import PathLike

    from .loading import Source

FUNCTION = "strftime_now"
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"]


def fix(tokenizer: PreTrainedTokenizerBase, date: str | None) -> PreTrainedTokenizerBase:
    """Make the tokenizer's chat template read the day `date` (YYYY-MM-DD) instead of the clock; None leaves it."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if date is not None and FUNCTION in template:
        # the newline ends the macro's own line, and transformers' Jinja drops it
        dated = f"{_macro(datetime.datetime.fromisoformat(date))}\n{template}"
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, chat_template=dated)
    return tokenizer


def recorded(source: Source) -> dict[str, str]:
    """Return {chat_date} as records have it; empty if the chat template of `source` reads no date or none is fixed."""
    return {"chat_date": source.chat_date} if source.chat_date and _reads_clock(source.path) else {}


def _reads_clock(folder: PathLike) -> bool:
    folder = Path(folder)
    files = [*folder.glob("chat_template*"), *folder.glob("additional_chat_templates/*")]
    files.append(folder / "tokenizer_config.json")
    return any(FUNCTION in file.read_text(encoding="utf-8") for file in files if file.is_file())


def _macro(day: datetime.datetime) -> str:
    """Return a Jinja macro that formats `day` as strftime does."""
    replaced = "".join(f" | replace('{directive}', '{day.strftime(directive)}')" for directive in DIRECTIVES)
    return f"{{%- macro {FUNCTION}(format) -%}}{{{{ format{replaced} | replace('%%', '%') }}}}{{%- endmacro %}}"
