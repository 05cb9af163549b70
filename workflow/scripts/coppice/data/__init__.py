"""Fetch datasets, check them and store them by role; format prompts; find the definitions of tasks.

`datasets` reads and writes prepared datasets, and the package exports its names; `row_checks` checks their rows.
`fetching` holds the fetch rules and `hub` talks to the Hugging Face Hub; `prompts` turns rows into text, and
`row_sources` reads them as a model is trained on them or asked them; `task_definitions` reads lm-eval's tasks.
"""

from .datasets import (
    ROLES,
    SELECTION_ROWS,
    Origin,
    facts,
    fingerprint,
    fingerprint_of,
    load,
    prepare,
    row_text,
    texts,
    write,
)
from .row_checks import TASK_COLUMNS

__all__ = [
    "ROLES",
    "SELECTION_ROWS",
    "TASK_COLUMNS",
    "Origin",
    "facts",
    "fingerprint",
    "fingerprint_of",
    "load",
    "prepare",
    "row_text",
    "texts",
    "write",
]
