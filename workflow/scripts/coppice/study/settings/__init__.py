"""Read, check and complete the configuration before any job starts.

    study = settings.load(config, configfiles=["config/config.yaml"])
    study.pairs()      # [("Llama", "best_acc"), ...]

Snakemake imports this package while it parses the workflow, so it imports nothing heavier than yaml and Pydantic, which
Snakemake imports too. Jobs use parts of the package that need neither, so both are imported at the first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from coppice.core.errors import SettingsError

from . import arms, rerun_policy

if TYPE_CHECKING:
    from .study import Study, load
    from .targets import check_targets

__all__ = ["SettingsError", "Study", "arms", "check_targets", "load", "rerun_policy"]

_PLACES = {"Study": "study", "load": "study", "check_targets": "targets"}


def __getattr__(name: str) -> object:
    """Import what jobs do not need when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
