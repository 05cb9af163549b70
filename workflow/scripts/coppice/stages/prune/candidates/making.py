"""Make one candidate by pruning, or import one of the user's, as a checkpoint folder with its `pruning.json`."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice import models
from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CheckpointError
from coppice.models import files, intake

from . import calibration

if TYPE_CHECKING:
    pass

logger = logging.getLogger("coppice.candidates")

# Tokenizers that differ usually differ on some of these characters.
PROBE = "In 1999:\n\n\tCafé crème, 東京 (don't)  x = 3.5; <end> E.g."


@dataclass(frozen=True)
class PruningRequest:
    """A pruning at one grid point. The same request gives the same weights on the same kind of machine."""

    source: models.Source
    """The dense model."""
    point: dict[str, Any]
    """The grid point (see `grid.resolve`)."""
    calibration: dict[str, Any]
    """{record (path of a dataset.json), dataset, samples, length in tokens, windows}."""
    output: Path
    """The folder to write."""
    seed: int = 0
    """Seed of the calibration sample."""


def prune(identity: dict[str, str], request: PruningRequest) -> None:
    """Prune a dense model; write the checkpoint and its `pruning.json`. identity: {model, candidate}."""
    clock = records.Clock()
    facts, used = make(request)
    recipe = {"source": asdict(request.source)}
    recipe |= {name: getattr(request, name) for name in ("point", "calibration", "seed")}
    facts = identity | {"origin": "pruned here", "recipe": recipe} | facts
    _write_record(facts, request.point, request.output, request.source.path, clock, request.seed, used)


def make(request: PruningRequest) -> tuple[dict[str, Any], str]:
    """Prune and write the checkpoint; return its facts and the calibration data's fingerprint."""
    from coppice.stages import prune

    source = request.source
    model = models.load(source)
    reader = source.reader()
    context = models.context_length(model)
    kind = models.kind_of(source)
    batches, used = calibration.batches(kind, reader, request.calibration, context, request.seed)
    result = prune.prune(model, request.point, batches)
    models.save(result.model, reader, request.output)
    return result.facts, used


def import_checkpoint(
    identity: dict[str, str],
    path: PathLike,
    given: Record,
    dense: PathLike,
    output: PathLike,
    needs: intake.Needs | None = None,
) -> None:
    """Link the user's checkpoint folder as a candidate and write its `pruning.json`.

    Args:
        identity: {model, candidate}.
        path: the user's checkpoint folder.
        given: column -> value of the candidate's row in the table.
        dense: path of the dense model's `model.json`.
        output: folder to write.
        needs: what the study asks of the model (`intake.Needs`); None checks nothing of it.

    Raises:
        CheckpointError: the folder is not a usable checkpoint, or is the dense model itself, or its tokenizer differs
            from the dense model's.
    """
    clock = records.Clock()
    path, output = Path(path).expanduser().absolute(), Path(output)
    files.check(path)
    files.check_tokenizer(path)
    with intake.told_of(identity["model"]):
        told = intake.check(path, needs) if needs else {}
    if _is_dense(path, dense):
        raise CheckpointError(
            f"{path}: candidate {identity['candidate']} of model {identity['model']} is the dense model itself (its "
            "weights are the same). Remove its row from candidates.table."
        )
    facts = identity | {"origin": str(path), "given": given, "parameters": models.count_parameters(path)} | told
    _check_tokens(path, models.folder_of(dense))
    link(path, output)
    _write_record(facts, {"method": "imported"}, output, path, clock, None, None)


def _is_dense(path: Path, dense: PathLike) -> bool:
    """Return True if the folder `path` holds the dense model's weights, even with another config.json or sharding."""
    if fingerprints.weights(path) == records.read(dense)["weights_fingerprint"]:
        return True
    place = models.folder_of(dense)
    return Path(place).is_dir() and files.same_tensors(path, place)


def _check_tokens(path: Path, dense: PathLike) -> None:
    """Raise CheckpointError if the tokenizers in the folders `path` and `dense` differ."""
    tokenized = [_tokenized(folder) for folder in (path, dense)]
    if None in tokenized:
        return
    (tokens, ids), (other_tokens, other_ids) = tokenized
    # The candidate may lack tokens of the dense model, but each of its tokens must have the same id there.
    if tokens != other_tokens or any(other_ids.get(text, place) != place for text, place in ids.items()):
        raise CheckpointError(
            f"{path}: the tokenizer differs from the dense model's ({dense}), so results cannot be compared. Copy the "
            "dense model's tokenizer files here."
        )


def _tokenized(folder: PathLike) -> tuple[list[int], dict[str, int]] | None:
    """Return (token ids of `PROBE`, vocabulary as token -> id) of a folder's tokenizer, or None if it does not load.

    A tokenizer that needs its own code does not load here; `_check_tokens` then checks nothing.
    """
    try:
        tokenizer = models.load_tokenizer(folder)
    except CheckpointError:
        return None
    return tokenizer(PROBE)["input_ids"], tokenizer.get_vocab()


def link(source: PathLike, folder: PathLike) -> None:
    """Fill `folder` with relative symbolic links to the files of `source`, after removing the links that it has.

    Leaves out subfolders, hidden files and `pruning.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # If the folder is itself reached through a link, `..` leads elsewhere than its path suggests: resolve it first.
    source, folder = Path(source).resolve(), folder.resolve()
    for old in folder.iterdir():
        if old.is_symlink():
            old.unlink()
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "pruning.json" and not file.name.startswith("."):
            (folder / file.name).symlink_to(os.path.relpath(file, folder))


def _write_record(
    facts: Record,
    settings: Record,
    output: PathLike,
    source: PathLike,
    clock: records.Clock,
    seed: int | None,
    calibration: str | None,
) -> None:
    output = Path(output)
    fingerprint = fingerprints.weights(output)
    dense = fingerprints.weights(source)
    if settings["method"] != "imported" and fingerprint == dense:
        raise CheckpointError(
            f"{output}: nothing was pruned (the checkpoint has the dense model's fingerprint). Choose other settings "
            "for this point in candidates.prune."
        )
    provenance = clock.provenance(settings, seed, source=dense, calibration=calibration)
    records.write(
        output / "pruning.json",
        facts | {"settings": settings, "weights_fingerprint": fingerprint, "provenance": provenance},
    )
