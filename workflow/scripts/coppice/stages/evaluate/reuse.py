"""Reuse the evaluation of another config that chose the same checkpoint, so that nothing is measured twice."""

import logging
from pathlib import Path

from coppice.core import records
from coppice.core.errors import CoppiceError
from coppice.stats import stored_samples

logger = logging.getLogger("coppice.evaluation")

# evaluation_results.json is written last: whoever finds it also finds the files that belong to it.
RECORDS = ("ppl_results.json", "evaluation_results.json")


def copy_results(identity, fingerprints, reused, output):
    """Copy the records and samples of the folder `reused` to `output`, under the name of `identity`.

    Args:
        identity: {model, config or candidate, stage} of the evaluation to write.
        fingerprints: {weights, adapter} of the model to be evaluated.
        reused: folder of the finished evaluation.
        output: folder to write.

    Raises:
        CoppiceError: `reused` holds the evaluation of another model.
    """
    reused, output = Path(reused), Path(output)
    found = {name: records.read(reused / name) for name in RECORDS}
    for name, record in found.items():
        if any(record["provenance"]["fingerprints"][part] != expected for part, expected in fingerprints.items()):
            raise CoppiceError(f"{reused / name}: the record is of another model. Delete it and run snakemake again.")
    stored_samples.copy_samples(reused, output, found["evaluation_results.json"]["samples"])
    for name, record in found.items():
        records.write(output / name, record | identity | {"reused_from": record["config"]})
    logger.info("reusing the evaluation of %s, which is of the same model", record["config"])
