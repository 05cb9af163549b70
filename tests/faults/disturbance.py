"""What disturbs a study: the moments of kills, the scripts of each stage, a user without rights."""

import os
import random
import tempfile
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534  # the user who owns nothing
# With those stages whose records nobody misses while the reports that were made of them are there
EVERY_STAGE = ("candidates", "select", "finetune", "evaluate", "compare", "all", "ablation")

# stage -> the scripts that do its work
STAGES = {
    "data": ("build_miniature_world", "build_miniature_model"),
    "prune": ("prune_candidate",),
    "score": ("score_candidate",),
    "select": ("select_best", "summarize_selection", "release_weights"),
    "finetune": ("finetune_lora",),
    "evaluate": ("evaluate_model",),
    "compare": ("compare_stages",),
    "report": ("write_report",),
    "ablation": ("train_arm", "write_ablation_report"),
}


def chances(name):
    """A source of random moments, the same for the same COPPICE_FAULTS_SEED (see conftest)."""
    return random.Random(f"{os.environ['COPPICE_FAULTS_SEED']} {name}")


@contextmanager
def not_as_root():
    """Without root's right to read everything, for the time being; what is imported then has to be imported before."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def open_to_all():
    """A folder that everybody may write to, and so may its parents' be entered; it goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
