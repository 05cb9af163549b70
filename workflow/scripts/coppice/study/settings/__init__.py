"""Read, check and complete the configuration before any job starts.

Snakemake imports this package while it parses the workflow, so it imports nothing heavier than yaml and jsonschema.

    study = settings.load(config, configfiles=["config/config.yaml"])
    study.pairs()      # [("Llama", "best_acc"), ...]
"""

from coppice.core.errors import SettingsError

from . import arms, rerun_policy
from .study import Study, load
from .targets import check_targets

__all__ = ["SettingsError", "Study", "arms", "check_targets", "load", "rerun_policy"]
