"""What Coppice needs of lm-eval beyond its documented interface.

Each function has a test in `tests/unit/test_library_compat.py`, which fails if lm-eval changes what the function uses.
Seen to work with lm-eval 0.4.13 (pinned in envs/requirements.txt).
"""

import functools
from pathlib import Path
from typing import Any


def load_yaml(path: str | Path, resolve_func: bool) -> dict[str, Any]:
    """Return a task's definition with the files that it includes.

    Args:
        path: the YAML file.
        resolve_func: import the functions that the definition names; if not, they stay text.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=resolve_func, recursive=True)


def compile_templates_once() -> None:
    """Cache lm-eval's compiled Jinja templates, which it otherwise compiles again for every item.

    This halves the CPU time of scoring 900 items with a miniature model.
    """
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = functools.lru_cache(maxsize=1024)(utils.env.from_string)
