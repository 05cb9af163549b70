"""Check a configuration by the models of its sections; word their errors: the key, what was found, what is valid."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from coppice.core.errors import SettingsError, nearest

from . import keys
from .sections.forms import KINDS, LARGEST, TAG, Form, form_of, form_of_field
from .sections.section import Section

PLAIN = "\n\t\u200c\u200d"  # invisible characters of ordinary text (the joiners occur in Persian and in emoji)
LONGEST = 10_000  # characters of any text value
LARGEST_INTEGER = 10**15  # a larger integer is a mistake: libraries hold none above 2^63
LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}

Place = tuple[str | int, ...]
AnySection = TypeVar("AnySection", bound=Section)


def checked(model: type[AnySection], raw: object, above: Place = ()) -> AnySection:
    """Return a section with the values `raw` and the defaults of keys that are left out.

    Args:
        model: the section's model.
        raw: its values, as read from a file.
        above: the section's own place, for messages; the first key may be dotted.

    Raises:
        SettingsError: names the first key that is unknown, missing or has a wrong value.
    """
    try:
        return model.model_validate(_plain(raw, above))
    except ValidationError as error:
        found = [_Violation(model, above, one) for one in error.errors(include_url=False)]
        raise SettingsError(min(found, key=_Violation.rank).message()) from None


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as text: ("models", "Llama", "prune", 0, "ratio") becomes `models.Llama.prune[0].ratio`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _plain(value: object, path: Place) -> object:
    """Return a copy in dictionaries and lists; reject text that no file or report can hold."""
    if isinstance(value, Mapping):
        return {_name(key, path): _plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, place)) for place, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, path)
    return value


def _name(key: object, path: Place) -> str:
    if not isinstance(key, str):
        raise SettingsError(f"config key {dotted((*path, str(key)))}: the name {key!r} is not text; put it in quotes")
    _check_text(key, (*path, key))
    return key


def _check_text(text: str, path: Place) -> None:
    """Reject control and format characters: file names and reports cannot hold them, and terminals execute some."""
    wrong = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Cf") and c not in PLAIN), None)
    if wrong is not None:
        raise SettingsError(
            f"config key {dotted(path)}: contains the invisible character U+{ord(wrong):04X}; remove it"
        )
    if len(text) > LONGEST:
        raise SettingsError(f"config key {dotted(path)}: has {len(text)} characters; at most {LONGEST} are allowed")


class _Violation:
    """An error of Pydantic, with the key that it is about."""

    def __init__(self, model: type[BaseModel], above: Place, error: ErrorDetails) -> None:
        self.kind, self.found, self.context = error["type"], error["input"], error.get("ctx", {})
        self.within, self.form, self.description, place = model, Form(section=model), "", []
        for part in error["loc"]:
            if not str(part).startswith(TAG):  # a tag says which member of a union was tried
                place.append(part)
                self._enter(part)
        self.path = (*above, *place)

    def _enter(self, part: str | int) -> None:
        """Go on to a key, a name or an item below the place where the violation is looked for."""
        section = self.form.section
        own = keys.keys_of(section).get(part) if section else None
        self.within = section or self.within
        if own is not None:
            self.form, self.description = form_of_field(own), own.description
        else:
            open_to = section.OPEN if section else self.form.items if isinstance(part, int) else self.form.entries
            self.form, self.description = form_of(open_to), ""

    def rank(self) -> tuple[int, int]:
        """Return what is reported first: unknown keys, then wrong kinds, both from the top down."""
        if self.kind == "extra_forbidden" or self._is_too_large():
            return 0, len(self.path)
        return 1 if self.kind.endswith("_type") else 2, len(self.path)

    def _is_too_large(self) -> bool:
        return isinstance(self.found, int | float) and self._largest() < abs(self.found) < math.inf

    def _largest(self) -> int:
        return LARGEST if "number" in self.form.kinds else LARGEST_INTEGER

    def message(self) -> str:
        """Word the violation in one sentence."""
        key, found = f"config key {dotted(self.path)}", _shown(self.found)
        if self.kind == "extra_forbidden":
            return unknown_key(self.path, list(keys.keys_of(self.within)))
        if self._is_too_large():
            return f"{key}: found a number beyond {self._largest():.0e}, which is too large; give a smaller one"
        if self.kind == "missing":
            return f"{key} is missing: {self.description}"
        if self.form.choices:
            valid = [_shown(value).strip("'") for value in self.form.choices]
            return f"{key}: found {found}; valid are {', '.join(valid)}{nearest(self.found, valid)}"
        if self.kind == "twice":
            return f"{key}: {_shown(self.context['item'])} is listed twice"
        if self.kind in ("too_short", "string_too_short"):
            least = self.context.get("min_length", 1)  # a section that must hold something has no length
            return f"{key}: must not be empty" if least == 1 else f"{key}: needs at least {least} entries"
        if self.kind == "string_pattern_mismatch":
            return f"{key}: found {found}; {self.description}"
        if self.kind in LIMITS:
            words, bound = LIMITS[self.kind]
            return f"{key}: found {found}, must be {words} {self.context[bound]:.17g}"
        wanted = " or ".join(KINDS[kind] for kind in self.form.kinds) or "another value"
        quotes = "text" in self.form.kinds and not isinstance(self.found, dict | list)
        return f"{key}: found {found}, but {wanted} is needed{'; put it in quotes' if quotes else ''}"


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)


def unknown_key(path: Place, siblings: Sequence[str]) -> str:
    """Word the message for an unknown key: suggest a sibling with a similar name, else the same name elsewhere."""
    name, parent = path[-1], path[:-1]
    close = get_close_matches(name, siblings, n=1, cutoff=0.5)
    if close:
        return f"config key {dotted(path)} is unknown; did you mean '{dotted((*parent, close[0]))}'?"
    elsewhere = [other.path for other in keys.every_key() if other.path[-1] == name]
    if elsewhere:
        # the first of the shortest, because a model may have sections like those of the study
        return f"config key {dotted(path)} is unknown; did you mean '{dotted(min(elsewhere, key=len))}'?"
    return f"config key {dotted(path)} is unknown; valid are {', '.join(dotted((*parent, key)) for key in siblings)}"
