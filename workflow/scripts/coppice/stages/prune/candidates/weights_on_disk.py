"""Delete the weights of candidates that no config chose, and restore them when a job needs them again.

The records of all candidates stay. A job that needs deleted weights prunes that one candidate again, with the settings
under `recipe` in its `pruning.json`, and checks that the fingerprint is the same.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from coppice import models
from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CheckpointError
from coppice.study import layout

from . import making

logger = logging.getLogger("coppice.candidates")

LOCK = ".weights.lock"


def checkpoint(selection: PathLike) -> str:
    """Return the folder of the chosen checkpoint, after restoring its weights if they are missing.

    Args:
        selection: path of its `selection_info.json`.
    """
    folder = Path(selection).parent
    candidate = layout.chosen_folder(selection, records.read(selection))
    ensure(candidate)
    with _locked(candidate):
        if not _has_weights(folder):
            making.link(candidate, folder)
    return str(folder)


def record_of(selection: PathLike | None) -> str | None:
    """Return the path of the chosen candidate's `pruning.json`. selection: path of `selection_info.json`, or None."""
    return selection and str(layout.chosen_folder(selection, records.read(selection)) / "pruning.json")


def ensure(folder: PathLike) -> str:
    """Return the path of the candidate in `folder`, after restoring its weights if they are missing or changed.

    A candidate pruned here is pruned again. A user's own is linked again, for example after the results were moved. If
    several jobs need the same candidate, one restores it and the others wait.

    Raises:
        CheckpointError: the user's weights are not the imported ones, or pruning again gives different weights.
    """
    folder = Path(folder)
    if not _is_whole(folder):
        with _locked(folder):
            if not _is_whole(folder):
                _restore(folder)
    return str(folder)


def release(model: str, folders: Mapping[str, PathLike], selections: Sequence[PathLike], output: PathLike) -> None:
    """Delete the weights of a model's candidates that no config chose, and record which ones.

    Also keeps what other studies in the same results folder chose.

    Args:
        model: name of the model.
        folders: candidate -> path of its pruning.json.
        selections: paths of the selection_info.json of all configs.
        output: path of the record to write.
    """
    others = [path for selection in selections for path in Path(selection).parents[1].glob("*/selection_info.json")]
    chosen = {records.read(path)["candidate"] for path in {*map(Path, selections), *others}}
    freed = {}
    for name, record in folders.items():
        folder = Path(record).parent
        if name in chosen or not records.read(record).get("recipe") or not _has_weights(folder):
            continue
        with _locked(folder):
            files = [*fingerprints.weights_files(folder), *folder.glob("*.index.json")]
            freed[name] = sum(file.stat().st_size for file in files)
            for file in files:
                file.unlink()
        logger.info("%s %s: not chosen; deleted its weights (%.2f GB)", model, name, freed[name] / 1e9)
    records.write(output, {"model": model, "kept": sorted(chosen), "freed_bytes": freed})


@contextmanager
def _locked(folder: PathLike) -> Iterator[None]:
    from filelock import FileLock

    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire()
    except OSError as error:
        raise CheckpointError(f"{Path(folder) / LOCK}: cannot be locked ({error}). Delete it.") from error
    try:
        yield
    finally:
        lock.release()


def _has_weights(folder: Path) -> bool:
    try:
        return all(file.exists() for file in fingerprints.weights_files(folder))
    except CheckpointError:
        return False


def _is_whole(folder: Path) -> bool:
    expected = records.read(folder / "pruning.json")["weights_fingerprint"]
    return _has_weights(folder) and fingerprints.weights(folder) == expected


def _restore(folder: Path) -> None:
    record = records.read(folder / "pruning.json")
    if record.get("recipe"):
        _prune_again(folder, record["recipe"], record["weights_fingerprint"])
    else:
        _link_again(folder, record)


def _link_again(folder: Path, record: Record) -> None:
    """Link a user's own candidate to its origin again and check that the origin still holds the imported weights."""
    if Path(record["origin"]).is_dir():
        making.link(record["origin"], folder)
    if not _is_whole(folder):
        raise CheckpointError(
            f"{record['origin']}: the weights are not the ones that were imported as candidate {record['candidate']}. "
            f"Put them back, or delete {folder / 'pruning.json'} and run snakemake again to study the new ones."
        )
    logger.info("%s: linked again to %s", folder, record["origin"])


def _prune_again(folder: Path, settings: Record, expected: str) -> None:
    source = models.Source(**settings["source"])
    if not Path(source.path).is_dir():
        raise CheckpointError(
            f"{folder}: the candidate's weights are missing, and so is the dense model to prune again ({source.path}). "
            f"Run: snakemake --forcerun prune_candidate {folder / 'pruning.json'}"
        )
    logger.info("%s: the weights are missing or changed; pruning the candidate again", folder)
    making.make(making.PruningRequest(source, settings["point"], settings["calibration"], folder, settings["seed"]))
    found = fingerprints.weights(folder)
    if found != expected:
        raise CheckpointError(
            f"{folder}: pruned again, the weights have fingerprint {found[:12]} instead of {expected[:12]} as when the "
            "candidate was scored, so the model, the data, the software or the machine has changed. Delete "
            f"{folder / 'pruning.json'} and run snakemake again."
        )
