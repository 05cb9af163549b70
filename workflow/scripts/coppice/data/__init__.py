"""Data sets: fetched, read, checked and written by role; prompts; definitions of tasks.

`datasets` writes and reads them, and its names are this package's own.
"""

from .datasets import (
    ROLES,
    SELECTION_ROWS,
    TASK_COLUMNS,
    facts,
    fingerprint,
    fingerprint_of,
    load,
    prepare,
    row_text,
    texts,
    write,
)

__all__ = [
    "ROLES",
    "SELECTION_ROWS",
    "TASK_COLUMNS",
    "facts",
    "fingerprint",
    "fingerprint_of",
    "load",
    "prepare",
    "row_text",
    "texts",
    "write",
]
