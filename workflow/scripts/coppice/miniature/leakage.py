"""Find held-out text inside training text.

Texts are compared as sequences of lower-case words without the labels "question" and "answer". Differences in case,
punctuation, spacing or question-and-answer form therefore do not hide a copy.
"""

import re
from collections.abc import Iterable

_WORD = re.compile(r"[a-z0-9]+")
_LABELS = frozenset(("question", "answer"))
_KEY_WORDS = 5


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text in the form in which texts are compared."""
    return tuple(word for word in _WORD.findall(text.lower()) if word not in _LABELS)


class HeldOut:
    """An index of held-out texts that finds them inside other texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Index the texts; raise ValueError for one that is too short to be found."""
        self._by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for text in texts:
            words = words_of(text)
            if len(words) < _KEY_WORDS:
                raise ValueError(
                    f"held-out text {text!r}: has {len(words)} words, but at least {_KEY_WORDS} are needed to find "
                    "copies of it in training text; make it longer"
                )
            self._by_start.setdefault(words[:_KEY_WORDS], []).append(words)

    def inside(self, text: str) -> bool:
        """Return True if the text contains a held-out text word for word."""
        words = words_of(text)
        for i in range(len(words) - _KEY_WORDS + 1):
            for held in self._by_start.get(words[i : i + _KEY_WORDS], ()):
                if words[i : i + len(held)] == held:
                    return True
        return False
