"""Manage the checkpoints of a training: which one to continue from, which is the best, and when old ones are deleted.

`complete.json` is written last and lists the digest of every file; a checkpoint is complete if it is there and all
digests match. A checkpoint belongs to a training by its key, a digest of settings and inputs. Checkpoints of another
key are never continued: they are moved aside, moved back if their settings return, and deleted once the training that
replaced them is finished.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.json_text import parsed

from .best_by import BestBy

logger = logging.getLogger("coppice.finetuning")

KEY = ".training_key.json"  # hidden, like the next one: `mirror.show` shows only files that are not
FINISHED = ".finished.json"
COMPLETE = "complete.json"
BEST = "best"
SUPERSEDED = "superseded"


def to_resume(output: Path, key: str) -> Path | None:
    """Return the newest complete checkpoint of the training `key` in `output`, or None.

    Incomplete checkpoints are deleted; those of another training are moved aside.
    """
    previous = _key_in(output)
    if previous != key:
        if found := list(output.glob("checkpoint-*")):
            _move_aside(found, output, previous)
        _bring_back(output, key)
        # written after the moves, so that a job that is killed in between repeats them
        with records.atomic(output / KEY) as file:
            json.dump({"key": key}, file)
    # newest first: if it is incomplete, the one before it is used
    for folder in sorted(output.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_whole(folder):
            logger.info("continuing from %s", folder.name)
            return folder
        logger.warning("%s was cut off while it was written, or is damaged: deleting it", folder.name)
        shutil.rmtree(folder)
    return None


def finish(output: Path, key: str, checkpoint: Path, outcome: Record) -> None:
    """Record that the training `key` is finished, with its best checkpoint and the facts for its record.

    The checkpoints of superseded settings are deleted now, as Snakemake replaces the outputs of old settings.
    """
    records.write(output / FINISHED, {"key": key, "checkpoint": checkpoint.name, "outcome": outcome})
    for aside in output.glob(f"{SUPERSEDED}-*"):
        shutil.rmtree(aside)


def finished(output: Path, key: str) -> tuple[Path, Record] | None:
    """Return (best checkpoint, outcome) if the training `key` is finished and that checkpoint complete, else None."""
    if not (output / FINISHED).is_file():
        return None
    try:
        found = records.read(output / FINISHED)
    except records.RecordError as error:
        logger.warning("%s", error)  # the training then resumes from its newest checkpoint
        return None
    checkpoint = output / found["checkpoint"]
    return (checkpoint, found["outcome"]) if found["key"] == key and is_whole(checkpoint) else None


def step_of(folder: PathLike) -> int:
    """Return the optimizer step after which a checkpoint was written, or -1 for a folder of another name."""
    digits = Path(folder).name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def facts_of(folder: Path) -> Record:
    """Return the facts that `Seal` stored with the checkpoint in addition to Trainer's state."""
    return records.read(folder / COMPLETE)["facts"]


def is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is unchanged since the checkpoint was completed."""
    try:
        digests = records.read(folder / COMPLETE)["sha256"]
    except (OSError, ValueError, KeyError, records.RecordError):
        return False
    # digests rather than sizes, because a damaged file may have the right size
    files = {folder / name: digest for name, digest in digests.items()}
    return all(file.is_file() and fingerprints.content_digest(file) == digest for file, digest in files.items())


class Seal(TrainerCallback):
    """Saves a checkpoint at every best validation, and completes each checkpoint after Trainer has written it.

    output: the folder of the training; facts: returns what a resumed training needs in addition to Trainer's own state;
    best_by: what decides which is the best. The link `best` points to the best checkpoint.
    """

    def __init__(self, output: PathLike, facts: Callable[[], Record], best_by: BestBy) -> None:
        """Seal the checkpoints in `output`, each with what `facts` returns when it is written."""
        self.output, self.facts, self.best_by = Path(output), facts, best_by

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Save if the validation is the best so far, also between the steps of `save_steps`."""
        # this callback runs before Trainer updates `best_metric`, which still holds the best of the earlier losses
        if self.best_by.better(metrics[self.best_by.name], state.best_metric):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Complete the checkpoint of the current step, then delete older ones except the best."""
        _wait_for_all()  # every process writes its random state into the checkpoint, and all digests must be listed
        if state.is_world_process_zero:
            self._seal(state)
        _wait_for_all()

    def _seal(self, state: TrainerState) -> None:
        folder = self.output / f"checkpoint-{state.global_step}"
        records.as_new_files(folder)  # safetensors creates files that only their owner can read
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)
        digests = {str(path.relative_to(folder)): fingerprints.content_digest(path) for path in files}
        records.write(folder / COMPLETE, {"step": state.global_step, "sha256": digests, "facts": self.facts()})
        # without validation no checkpoint is the best, and the newest is kept
        best = Path(state.best_model_checkpoint or folder).name
        if state.best_model_checkpoint:
            _point(self.output / BEST, best)
        # deleted last: a job that is killed anywhere above still has an older complete checkpoint
        for old in self.output.glob("checkpoint-*"):
            if old.name not in (folder.name, best):
                shutil.rmtree(old)


def _wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def _point(link: Path, target: str) -> None:
    """Point the symbolic link `link` to `target`, a name in the same folder."""
    # renaming a new link over the old one is atomic: there is no moment without `best`
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _key_in(output: Path) -> str | None:
    try:
        return parsed((output / KEY).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # without a readable key, checkpoints are moved aside instead of continued


def _aside(output: Path, key: str | None) -> Path:
    return output / f"{SUPERSEDED}-{(key or 'unknown')[:8]}"


def _move_aside(found: Sequence[Path], output: Path, key: str | None) -> None:
    aside = _aside(output, key)
    logger.warning("moving %d checkpoints of other settings to %s until this training is finished", len(found), aside)
    aside.mkdir(exist_ok=True)
    # the merged checkpoint belongs to the old settings too, and so does `best`, which points to one of the checkpoints
    for path in [*found, output / "merged", output / BEST]:
        if path.is_symlink() or path.is_dir():
            _move(path, aside)


def _bring_back(output: Path, key: str) -> None:
    """Move the checkpoints of the training `key` back, because its settings apply again."""
    aside = _aside(output, key)
    if aside.is_dir():
        logger.info("the checkpoints in %s have these settings: moving them back", aside)
        for path in aside.iterdir():
            _move(path, output)
        aside.rmdir()


def _move(path: Path, folder: Path) -> None:
    """Move a link or a folder into `folder`, replacing what has the same name."""
    there = folder / path.name
    # os.replace overwrites a link or an empty folder, but not a folder with files
    if there.is_dir() and not there.is_symlink():
        shutil.rmtree(there)
    os.replace(path, there)
