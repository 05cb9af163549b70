"""Taking over the training of another config that chose the same checkpoint: nothing is learnt twice."""

import logging
import os
import shutil
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.errors import CoppiceError

logger = logging.getLogger("coppice.finetuning")

RECORD, STATE, LOSSES = "finetuning_config.json", "training_state.json", "validation_losses.json"
NAMED = (LOSSES, STATE, RECORD)  # these say who was trained; the last one says that all of it is there
OWN = (*NAMED, "arm.json", "reached.json")
MERGED = "merged"


def take_over(identity, source, reused, output, settings, seed):
    """Fill `output` with copies of the adapter and the records in the folder `reused`, under the name of `identity`.

    source: the checkpoint (a models.Source) that both were to be trained from; settings, seed: what decides what is
    learnt from it. A merged checkpoint is linked. Raises CoppiceError if that was trained otherwise.
    """
    reused, output = Path(reused), Path(output)
    record = records.read(reused / RECORD)
    same = record["provenance"]["fingerprints"]["weights"] == fingerprints.weights(source.path)
    same &= record["provenance"]["seed"] == seed
    if not same or any(record["settings"].get(key) != value for key, value in settings.items()):
        raise CoppiceError(
            f"{reused}: was trained from another checkpoint than {source.path}, or with other settings; delete "
            f"{reused / RECORD} and run snakemake again"
        )
    output.mkdir(parents=True, exist_ok=True)
    _link_merged(reused, output)
    for file in sorted(reused.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name not in OWN:
            records.copy(file, output / file.name)
    for name in NAMED:
        if (reused / name).is_file():
            records.write(output / name, records.read(reused / name) | identity | {"reused_from": record["config"]})
    logger.info("the training of %s is taken over: it is of the same checkpoint", record["config"])


def leave(output):
    """Forget a merged checkpoint that is another config's, before `output` gets one of its own."""
    if (output / MERGED).is_symlink():
        (output / MERGED).unlink()


def _link_merged(reused, output):
    """Link the merged checkpoint of `reused`; one that a training left in `output` is of another model and goes."""
    leave(output)
    if (output / MERGED).is_dir():
        shutil.rmtree(output / MERGED)
    if (reused / MERGED).is_dir():
        (output / MERGED).symlink_to(os.path.relpath((reused / MERGED).resolve(), output.resolve()))
