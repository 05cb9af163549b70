"""Helpers of the fault tests: random moments, the scripts of each stage, and a user without root's rights."""

import os
import random
import tempfile
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534  # a user id that owns no files
# `all` does not remake a missing record while the reports made from it exist, so every stage is named.
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


def seeded_random(name):
    """Return a random generator, the same for the same COPPICE_FAULTS_SEED (see conftest)."""
    return random.Random(f"{os.environ['COPPICE_FAULTS_SEED']} {name}")


@contextmanager
def without_root():
    """Give up root's right to read every file inside the block.

    Import what the block needs before the block, which may not be able to read root's modules.
    """
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def world_writable_folder():
    """Yield a temporary folder that every user may enter and write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
