"""Taking over the evaluation of another config that chose the same checkpoint: nothing is measured twice."""

import logging
from pathlib import Path

from coppice.core import records
from coppice.core.errors import CoppiceError
from coppice.stats import stored_samples

logger = logging.getLogger("coppice.evaluation")

RECORDS = ("ppl_results.json", "evaluation_results.json")  # the one that is waited for last


def take_over(identity, prints, reused, output):
    """Fill `output` with the records and samples in the folder `reused`, under the name of `identity`.

    prints: fingerprints {weights, adapter} of the model that is to be evaluated. Raises CoppiceError if `reused` is of
    another model.
    """
    reused, output = Path(reused), Path(output)
    found = {name: records.read(reused / name) for name in RECORDS}
    for name, record in found.items():
        if any(record["provenance"]["fingerprints"][part] != known for part, known in prints.items()):
            raise CoppiceError(f"{reused / name}: is of another model; delete it and run snakemake again")
    stored_samples.copy_samples(reused, output, found["evaluation_results.json"]["samples"])
    for name, record in found.items():
        records.write(output / name, record | identity | {"reused_from": record["config"]})
    logger.info("the evaluation of %s is taken over: it is of the same model", record["config"])
