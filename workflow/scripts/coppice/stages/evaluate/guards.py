"""Checks that the model under evaluation is the one that it is taken for, made on fingerprints before it is loaded."""

from pathlib import Path

from coppice import models
from coppice.core import records
from coppice.core.errors import CheckpointError

SAME_SIZE = ("imported", "unstructured")  # how a user's own was made is not known; zeros are parameters too


def check_adapter(folder, weights):
    """Refuse an adapter whose files (fingerprint `weights`) are not those that its training wrote."""
    record = Path(folder) / "finetuning_config.json"
    if not record.is_file():  # an adapter from elsewhere: nothing says how it was written
        return
    known = records.read(record).get("trained_fingerprint")  # older records do not have it
    if known not in (None, weights):
        raise CheckpointError(
            f"{folder}: adapter_model.safetensors or adapter_config.json was changed after it was written (the "
            f"fingerprint differs); run snakemake --forcerun finetune_lora {record}: where its training was finished, "
            "the adapter is restored from its checkpoint"
        )


def check_pruned(folder, weights, selection, dense):
    """Refuse a pruned checkpoint that is the dense model, or not the one that was selected.

    folder: the checkpoint's; weights: its fingerprint; selection: path of its `selection_info.json`; dense: path of the
    dense model's `model.json`. A structurally pruned model must also have fewer parameters than the dense one.
    """
    chosen, whole, place = records.read(selection), records.read(dense), models.folder_of(dense)
    again = f"delete {Path(selection).parent} and the candidate it links to, and run snakemake again"
    if weights == whole["weights_fingerprint"]:
        raise CheckpointError(f"{folder}: the pruned model has the dense model's weights ({place}): {again}")
    if weights != chosen["weights_fingerprint"]:
        raise CheckpointError(f"{folder}: its weights are not those of the selected {chosen['candidate']}: {again}")
    if chosen["pruning"]["method"] in SAME_SIZE:
        return
    left, all_ = models.count_parameters(folder), models.count_parameters(place)
    if left is not None and all_ is not None and left >= all_:
        raise CheckpointError(
            f"{folder}: was pruned by {chosen['pruning']['method']}, but has {left} parameters, the dense model "
            f"{all_}: {again}"
        )
