"""Check by fingerprints, before loading, that the model under evaluation is the intended one."""

from pathlib import Path

from coppice import models
from coppice.core import records
from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError

# Methods that may leave the parameter count unchanged: an imported model may have been pruned in any way, and
# unstructured pruning sets weights to zero without removing them.
SAME_SIZE = ("imported", "unstructured")


def check_pruned(folder: PathLike, weights: str | None, candidate: PathLike, dense: PathLike) -> None:
    """Raise CheckpointError if a pruned checkpoint is the dense model or not the expected candidate.

    A structurally pruned model must also have fewer parameters than the dense model.

    Args:
        folder: the checkpoint.
        weights: its fingerprint.
        candidate: path of the candidate's `pruning.json`.
        dense: path of the dense model's `model.json`.
    """
    pruned, dense_record, dense_folder = records.read(candidate), records.read(dense), models.folder_of(dense)
    remedy = f"Delete {Path(candidate).parent} and run snakemake again."
    if weights == dense_record["weights_fingerprint"]:
        raise CheckpointError(f"{folder}: the pruned model has the dense model's weights ({dense_folder}). {remedy}")
    if weights != pruned["weights_fingerprint"]:
        raise CheckpointError(f"{folder}: the weights are not those of candidate {pruned['candidate']}. {remedy}")
    method = pruned["settings"]["method"]
    if method in SAME_SIZE:
        return
    # the weights are those of the records, so the sizes are, too; records of earlier versions may lack the dense one
    pruned_size = pruned["parameters"]["after"]
    dense_size = dense_record.get("parameters") or models.count_parameters(dense_folder)
    if pruned_size >= dense_size:
        raise CheckpointError(
            f"{folder}: the model was pruned by {method}, but has {pruned_size} parameters, no fewer than the dense "
            f"model's {dense_size}. {remedy}"
        )
