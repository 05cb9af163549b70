"""Whose weights stay: those of candidates that were not chosen go, and come back when they are asked for again.

The records of all candidates stay. A job that needs weights which are gone makes that one candidate anew, from the
recipe in its `pruning.json`, and finds the same fingerprint.
"""

import logging
from contextlib import contextmanager
from pathlib import Path

from coppice import models
from coppice.core import fingerprints, records
from coppice.core.errors import CheckpointError
from coppice.study import layout

from . import making

logger = logging.getLogger("coppice.candidates")

LOCK = ".weights.lock"


def checkpoint(selection):
    """The folder of a chosen checkpoint, by its `selection_info.json`; its weights are there when this returns."""
    folder = Path(selection).parent
    candidate = layout.chosen_folder(selection, records.read(selection))
    ensure(candidate)
    with _locked(candidate):
        if not _has_weights(folder):
            making.link(candidate, folder)
    return str(folder)


def ensure(folder):
    """Make the weights of the candidate in `folder` anew where they were let go or are not those of its record.

    A user's own are linked again where the links lead nowhere, as in results that were moved. Several jobs may want the
    same candidate: one makes it, the others wait. Raises CheckpointError where a user's own weights are not those that
    were taken in, or others come out different.
    """
    folder = Path(folder)
    if _is_whole(folder):
        return
    with _locked(folder):
        if not _is_whole(folder):
            _restore(folder)


def release(model, folders, selections, output):
    """Delete the weights of a model's candidates that no config chose, and write which into the record `output`.

    folders: candidate -> path of its pruning.json; selections: paths of selection_info.json of all configs. What other
    studies in the same results chose stays too.
    """
    others = [path for known in selections for path in Path(known).parents[1].glob("*/selection_info.json")]
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
        logger.info("%s %s: not chosen, its weights are deleted (%.2f GB)", model, name, freed[name] / 1e9)
    records.write(output, {"model": model, "kept": sorted(chosen), "freed_bytes": freed})


@contextmanager
def _locked(folder):
    from filelock import FileLock

    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire()
    except OSError as error:
        raise CheckpointError(f"{Path(folder) / LOCK}: cannot be locked ({error}); delete it") from error
    try:
        yield
    finally:
        lock.release()


def _has_weights(folder):
    try:
        return all(file.exists() for file in fingerprints.weights_files(folder))
    except CheckpointError:
        return False


def _is_whole(folder):
    known = records.read(folder / "pruning.json")["weights_fingerprint"]
    return _has_weights(folder) and fingerprints.weights(folder) == known


def _restore(folder):
    record = records.read(folder / "pruning.json")
    if record.get("recipe"):
        _make_anew(folder, record["recipe"], record["weights_fingerprint"])
    else:
        _link_anew(folder, record)


def _link_anew(folder, record):
    """Link a user's own candidate to where it came from, which still has to hold the weights that were taken in."""
    if Path(record["origin"]).is_dir():
        making.link(record["origin"], folder)
    if not _is_whole(folder):
        raise CheckpointError(
            f"{record['origin']}: its weights are not those that were taken in as candidate {record['candidate']}; "
            f"put them back, or delete {folder / 'pruning.json'} and run snakemake again to study the new ones"
        )
    logger.info("%s: linked again to %s", folder, record["origin"])


def _make_anew(folder, recipe, known):
    source = models.Source(**recipe["source"])
    if not Path(source.path).is_dir():
        raise CheckpointError(
            f"{folder}: its weights are gone, and so is the dense model that they are made from ({source.path}); "
            f"run snakemake --forcerun prune_candidate {folder / 'pruning.json'}"
        )
    logger.info("%s: its weights are not there; the candidate is made anew", folder)
    making.make(source, recipe["point"], recipe["calibration"], folder, recipe["seed"])
    found = fingerprints.weights(folder)
    if found != known:
        raise CheckpointError(
            f"{folder}: made anew, its weights have the fingerprint {found[:12]}, not {known[:12]} as when it was "
            f"scored: model, data, software or machine changed; delete {folder / 'pruning.json'} and run snakemake "
            "again"
        )
