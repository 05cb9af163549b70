"""The checkpoints of a training: which one to continue from, which are another training's, which is the best.

A checkpoint is whole when its `complete.json` is there and every file has the digest that stands in it: it is written
last. Checkpoints belong to a training by its key, a digest of settings and inputs; those of another key are moved
aside, never continued. They come back where their settings do, and go once the training that replaced them is finished.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from torch import distributed
from transformers import TrainerCallback

from coppice.core import fingerprints, records
from coppice.core.json_text import parsed

logger = logging.getLogger("coppice.finetuning")

KEY = ".training_key.json"
FINISHED = ".finished.json"
COMPLETE = "complete.json"
BEST = "best"
SUPERSEDED = "superseded"


def to_resume(output, key):
    """The newest whole checkpoint in `output` of the training `key`, or None; torn ones go, others' are moved aside."""
    known = _key_in(output)
    if known != key:
        if found := list(output.glob("checkpoint-*")):
            _move_aside(found, output, known)
        _bring_back(output, key)
        with records.atomic(output / KEY) as file:
            json.dump({"key": key}, file)
    for folder in sorted(output.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_whole(folder):
            logger.info("continuing from %s", folder.name)
            return folder
        logger.warning("%s was cut off while it was written, or is damaged: it is left out", folder.name)
        shutil.rmtree(folder)
    return None


def finish(output, key, checkpoint, outcome):
    """Note that the training `key` is done, with the checkpoint that holds its adapter and the facts for its record.

    What it supersedes goes now, as the results of old settings do in any Snakemake workflow.
    """
    records.write(output / FINISHED, {"key": key, "checkpoint": checkpoint.name, "outcome": outcome})
    for aside in output.glob(f"{SUPERSEDED}-*"):
        shutil.rmtree(aside)


def finished(output, key):
    """(checkpoint with the adapter, outcome) of the training `key` where it is done and that is whole, else None."""
    if not (output / FINISHED).is_file():
        return None
    try:
        found = records.read(output / FINISHED)
    except records.RecordError as error:
        logger.warning("%s", error)
        return None
    checkpoint = output / found["checkpoint"]
    return (checkpoint, found["outcome"]) if found["key"] == key and is_whole(checkpoint) else None


def step_of(folder):
    """The optimizer step after which a checkpoint was written; -1 for a folder of another name."""
    digits = Path(folder).name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def facts_of(folder):
    """What `Seal` was told beside Trainer's state when it sealed the checkpoint."""
    return records.read(folder / COMPLETE)["facts"]


def is_whole(folder):
    """Whether every file of a checkpoint is as it was when the checkpoint was finished."""
    try:
        digests = records.read(folder / COMPLETE)["sha256"]
    except (OSError, ValueError, KeyError, records.RecordError):
        return False
    files = {folder / name: digest for name, digest in digests.items()}
    return all(file.is_file() and fingerprints.content_digest(file) == digest for file, digest in files.items())


class Seal(TrainerCallback):
    """Has every best model saved, and writes `complete.json` into each checkpoint once Trainer has written the rest.

    `facts()` is what a resumed training has to know beside Trainer's own state. `best` points to the best checkpoint.
    """

    def __init__(self, output, facts):
        self.output, self.facts = Path(output), facts

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Save at a validation loss lower than all before, whatever `save_steps` says."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Seal the checkpoint of the current step; only then do older ones go, all but the best."""
        _wait_for_all()  # the other processes' random states are files of the checkpoint too
        if state.is_world_process_zero:
            self._seal(state)
        _wait_for_all()

    def _seal(self, state):
        folder = self.output / f"checkpoint-{state.global_step}"
        records.as_new_files(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
        digests = {str(path.relative_to(folder)): fingerprints.content_digest(path) for path in files}
        records.write(folder / COMPLETE, {"step": state.global_step, "sha256": digests, "facts": self.facts()})
        best = Path(state.best_model_checkpoint or folder).name
        if state.best_model_checkpoint:
            _point(self.output / BEST, best)
        for old in self.output.glob("checkpoint-*"):
            if old.name not in (folder.name, best):
                shutil.rmtree(old)


def _wait_for_all():
    if distributed.is_initialized():
        distributed.barrier()


def _point(link, target):
    """Make `link` a relative symbolic link to `target` beside it, in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _key_in(output):
    try:
        return parsed((output / KEY).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _aside(output, key):
    return output / f"{SUPERSEDED}-{(key or 'unknown')[:8]}"


def _move_aside(found, output, known):
    aside = _aside(output, known)
    logger.warning(
        "%d checkpoints of other settings are moved to %s until this training is finished", len(found), aside
    )
    aside.mkdir(exist_ok=True)
    for path in [*found, output / "merged", output / BEST]:
        if path.is_symlink() or path.is_dir():
            _move(path, aside)


def _bring_back(output, key):
    """Take back what was moved aside of the training `key`, whose settings are in force again."""
    aside = _aside(output, key)
    if aside.is_dir():
        logger.info("the checkpoints in %s are of these settings and come back", aside)
        for path in aside.iterdir():
            _move(path, output)
        aside.rmdir()


def _move(path, folder):
    """Move a link or a folder into `folder`, in place of one of that name."""
    there = folder / path.name
    if there.is_dir() and not there.is_symlink():
        shutil.rmtree(there)
    os.replace(path, there)
