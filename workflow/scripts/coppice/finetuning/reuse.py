"""Taking over the training of another config that chose the same checkpoint: nothing is learnt twice."""

import logging
import os
import shutil
from pathlib import Path

from .. import fingerprints, records
from ..errors import CoppiceError

logger = logging.getLogger("coppice.finetuning")

RECORD = "finetuning_config.json"


def take_over(identity, source, twin, output):
    """Fill `output` with copies of the adapter and the records in the folder `twin`, under the name of `identity`.

    source: the checkpoint (a models.Source) that both were to be trained from. A merged checkpoint is linked. Raises
    CoppiceError where the twin was trained from another one.
    """
    twin, output = Path(twin), Path(output)
    record = records.read(twin / RECORD)
    if record["provenance"]["fingerprints"]["weights"] != fingerprints.weights(source.path):
        raise CoppiceError(
            f"{twin}: was trained from another checkpoint than {source.path}; delete {twin / RECORD} and run snakemake "
            "again"
        )
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(twin.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.name != RECORD:
            partial = output / f".partial-{file.name}"
            shutil.copyfile(file, partial)
            partial.replace(output / file.name)
    if (twin / "merged").is_dir() and not (output / "merged").exists():
        (output / "merged").symlink_to(os.path.relpath(twin / "merged", output))
    records.write(output / RECORD, record | identity | {"reused_from": record["config"]})
    logger.info("the training of %s is taken over: it is of the same checkpoint", record["config"])
