"""Reuse a training: copy the adapter of another config that selected the same checkpoint, instead of training twice."""

import logging
import os
import shutil
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.errors import CoppiceError

logger = logging.getLogger("coppice.finetuning")

RECORD, STATE, LOSSES = "finetuning_config.json", "training_state.json", "validation_losses.json"
NAMED = (LOSSES, STATE, RECORD)  # these name the model and config; RECORD is last, since it means that all are there
OWN = (*NAMED, "arm.json", "reached.json")
MERGED = "merged"


def copy_results(identity, source, reused, output, settings, seed):
    """Copy the adapter and the records from the folder `reused` to `output`, under the name `identity`.

    A merged checkpoint is linked instead of copied.

    Args:
        identity: {model, config} of the config that reuses the training.
        source: the checkpoint (a models.Source) that both configs selected.
        reused: the folder of the finished training.
        output: the folder to fill.
        settings: the settings that affect what is learned.
        seed: the seed of the training.

    Raises:
        CoppiceError: The training in `reused` began from other weights, or used other settings or another seed.
    """
    reused, output = Path(reused), Path(output)
    record = records.read(reused / RECORD)
    same = record["provenance"]["fingerprints"]["weights"] == fingerprints.weights(source.path)
    same &= record["provenance"]["seed"] == seed
    if not same or any(record["settings"].get(key) != value for key, value in settings.items()):
        raise CoppiceError(
            f"{reused}: this training cannot be reused, because it began from other weights than {source.path} or "
            f"used other settings. Delete {reused / RECORD} and run snakemake again."
        )
    output.mkdir(parents=True, exist_ok=True)
    _link_merged(reused, output)
    for file in sorted(reused.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name not in OWN:
            records.copy(file, output / file.name)
    for name in NAMED:
        if (reused / name).is_file():
            records.write(output / name, records.read(reused / name) | identity | {"reused_from": record["config"]})
    logger.info("reusing the training of %s, which selected the same checkpoint", record["config"])


def leave(output):
    """Remove a link to another config's merged checkpoint, before a training writes its own into `output`."""
    if (output / MERGED).is_symlink():
        (output / MERGED).unlink()


def _link_merged(reused, output):
    """Link the merged checkpoint of `reused` in place of one that an earlier training left in `output`."""
    leave(output)
    if (output / MERGED).is_dir():
        shutil.rmtree(output / MERGED)
    if (reused / MERGED).is_dir():
        (output / MERGED).symlink_to(os.path.relpath((reused / MERGED).resolve(), output.resolve()))
