"""The prune stage: make one candidate here, or take in one of the user's, as a checkpoint with its `pruning.json`."""

import logging
import os
from dataclasses import asdict
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.errors import CheckpointError, DataError
from coppice.models import files

logger = logging.getLogger("coppice.candidates")

# Where tokenizers differ, they do on one of these
PROBE = "In 1999:\n\n\tCafé crème, 東京 (don't)  x = 3.5; <end> E.g."


def prune(identity, source, point, calibration, output, seed=0):
    """Prune the dense model `source` (a models.Source) at a `point` of the grid; writes checkpoint and `pruning.json`.

    identity: {model, candidate}; calibration: {record (path of a dataset.json), dataset, samples, length}.
    """
    clock = records.Clock()
    facts, used = make(source, point, calibration, output, seed)
    recipe = {"source": asdict(source), "point": point, "calibration": calibration, "seed": seed}
    facts = identity | {"origin": "pruned here", "recipe": recipe} | facts
    _write_record(facts, point, output, source.path, clock, seed, used)


def make(source, point, calibration, output, seed):
    """Write the checkpoint that pruning `source` at `point` gives; returns (its facts, the calibration's fingerprint).

    The same arguments give the same weights, on the same kind of machine.
    """
    from coppice.stages import prune

    model = models.load(source)
    tokenizer = models.load_tokenizer(source.path, source.trust_remote_code)
    batches, used = calibration_batches(tokenizer, calibration, models.context_length(model), seed)
    device = models.device()
    result = prune.prune(model, point, [batch.to(device) for batch in batches])
    models.save(result.model, tokenizer, output)
    return result.facts, used


def calibration_batches(tokenizer, calibration, context, seed):
    """`samples` windows of `length` tokens from the train rows of the calibration data, as LongTensors [B, T].

    Returns them with the data's fingerprint. The windows are spread evenly over the text.
    """
    import torch

    from coppice.stages.evaluate.perplexity import encode

    facts = data.facts(calibration["record"], "train")
    rows = data.texts(calibration["record"], "train")
    length = min(calibration["length"], context)
    picks = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ids, needed = [], calibration["samples"] * length
    for start in range(0, len(picks), 256):
        ids.extend(encode(tokenizer, [rows[i] for i in picks[start : start + 256]], "\n\n").tolist())
        if len(ids) >= needed:
            break
    count = min(calibration["samples"], len(ids) // length)
    if not count:
        raise DataError(f"dataset {calibration['dataset']}: too short to calibrate on (under {length} tokens)")
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return list(windows.split(max(1, 4096 // length))), facts["fingerprint"]


def take_in(identity, path, given, dense, output):
    """Link the user's checkpoint folder `path` as a candidate; its `pruning.json` holds the `given` columns.

    dense: path of the dense model's `model.json`; CheckpointError where the candidate is that model itself, or has
    another tokenizer.
    """
    clock = records.Clock()
    path, output = Path(path).expanduser().absolute(), Path(output)
    files.check(path)
    files.check_tokenizer(path)
    if _is_dense(path, dense):
        raise CheckpointError(
            f"{path}: candidate {identity['candidate']} of model {identity['model']} is the dense model itself (it has "
            "the same weights): nothing was pruned; take its row out of candidates.table"
        )
    facts = identity | {"origin": str(path), "given": given, "parameters": models.count_parameters(path)}
    _check_tokens(path, models.folder_of(dense))
    link(path, output)
    _write_record(facts, {"method": "imported"}, output, path, clock, None, None)


def _is_dense(path, dense):
    """Whether the folder `path` holds the weights of the model.json `dense`, under another configuration or cut into
    other files too."""
    if fingerprints.weights(path) == records.read(dense)["weights_fingerprint"]:
        return True
    place = models.folder_of(dense)
    return Path(place).is_dir() and files.same_tensors(path, place)


def _check_tokens(path, dense):
    """Refuse a candidate in `path` that reads text otherwise than the model in the folder `dense`."""
    read = [_reading(folder) for folder in (path, dense)]
    if None in read:
        return
    (tokens, ids), (other_tokens, other_ids) = read
    if tokens != other_tokens or any(other_ids.get(text, place) != place for text, place in ids.items()):
        raise CheckpointError(
            f"{path}: its tokenizer makes other tokens of the same text than the dense model's ({dense}), so that no "
            "number of theirs compares; put the tokenizer files of the dense model beside its weights"
        )


def _reading(folder):
    """(token ids of a text, ids of all tokens by their text) of the tokenizer in `folder`; None for one that does not
    load by itself, of which nothing is known here."""
    try:
        tokenizer = models.load_tokenizer(folder)
    except CheckpointError:
        return None
    return tokenizer(PROBE)["input_ids"], tokenizer.get_vocab()


def link(source, folder):
    """Fill `folder` with relative symbolic links to the files of `source`; links of an earlier call go.

    Relative to where the folder really lies: from one that is reached by a link itself, `..` leads elsewhere.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, folder = Path(source).resolve(), folder.resolve()
    for old in folder.iterdir():
        if old.is_symlink():
            old.unlink()
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "pruning.json" and not file.name.startswith("."):
            (folder / file.name).symlink_to(os.path.relpath(file, folder))


def _write_record(facts, settings, output, source, clock, seed, calibration):
    output = Path(output)
    print_ = fingerprints.weights(output)
    dense = fingerprints.weights(source)
    if settings["method"] != "imported" and print_ == dense:
        raise CheckpointError(f"{output}: the pruned checkpoint has the dense one's fingerprint: nothing was pruned")
    provenance = clock.provenance(settings, seed, source=dense, calibration=calibration)
    records.write(
        output / "pruning.json",
        facts | {"settings": settings, "weights_fingerprint": print_, "provenance": provenance},
    )
