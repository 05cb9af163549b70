"""The configuration: read, checked and completed before any job starts.

Imported while Snakemake parses the workflow, so it needs nothing heavier than yaml and jsonschema.

    study = settings.load(config, configfiles=["config/config.yaml"])
    study.pairs()      # [("Llama", "best_acc"), ...]
"""

from coppice.core.errors import SettingsError

from . import arms, rerun_policy
from .study import Study, load
from .targets import check_targets

__all__ = ["SettingsError", "Study", "arms", "check_targets", "load", "rerun_policy"]
