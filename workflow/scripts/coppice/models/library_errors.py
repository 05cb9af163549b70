"""Word the errors that libraries raise while they read a user's files."""

from __future__ import annotations

import re

from .pickles import CONVERT

# torch and the libraries above it answer an unsafe file by advising to load it regardless
UNSAFE_ADVICE = re.compile(r"weights_only|allow_pickle|UnpicklingError|torch\.load|add_safe_globals", re.IGNORECASE)


def described(error: Exception) -> str:
    """Return the text of a library's error, with its type unless that is OSError or ValueError, which say little.

    Advice to load a file that may run code is replaced by the way to convert it.
    """
    text = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    if UNSAFE_ADVICE.search(text):
        return (
            "the file is damaged, or it holds pickled Python objects, which Coppice does not load because they can run "
            f"any code. If you trust whoever made it, convert it first: {CONVERT.format('FILE')}"
        )
    return text
