"""Let one folder show the results in another: link its files, and copy its records under another name.

Several configs that choose one candidate share its results in this way. Links are symbolic, so that Snakemake, which
deletes and touches outputs, never reaches the files behind them, and relative, so that they hold in a copy of the
results.
"""

import fnmatch
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from . import disks, records
from .aliases import PathLike, Record

logger = logging.getLogger("coppice.mirror")

SUPERSEDED = "superseded"
ORIGIN = ".origin"  # in a folder that shows another one: the link to that one


def show(source: PathLike, folder: PathLike, identity: Record, named: Iterable[str], own: Iterable[str] = ()) -> None:
    """Fill `folder` with the results in `source`, and remove the links that it had to other results.

    Args:
        source: folder of the results. Its hidden files are left out.
        folder: folder to fill.
        identity: the fields in which the records differ in `folder`, such as {config: name}.
        named: file names of the records that get these fields. They are written in this order.
        own: patterns of names that are not shown, and stay in `folder` if they are there.
    """
    source, folder = Path(source).resolve(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    apart = (".*", f"{SUPERSEDED}-*", *named, *own)
    names = [path.name for path in source.iterdir() if not any(fnmatch.fnmatchcase(path.name, one) for one in apart)]
    clear(folder, keep=names)
    _link(source, folder / ORIGIN)
    for name in sorted(names):
        _link(source / name, folder / name)
    for name in named:
        if (source / name).is_file():
            record = records.read(source / name)
            records.write(folder / name, identity | {key: record[key] for key in record if key not in identity})


def clear(folder: PathLike, keep: Iterable[str] = ()) -> None:
    """Remove the links in `folder` that lead out of it, except those named in `keep`.

    A job that writes its own results into a folder must call this first, or it would write through the links.
    """
    for path in Path(folder).glob("*"):
        if path.is_symlink() and os.sep in os.readlink(path) and path.name not in keep:
            path.unlink()


def origin_of(record: PathLike) -> str:
    """Return the path of a record or, if its folder shows another one, of the record that it was copied from."""
    record = Path(record)
    origin = record.parent / ORIGIN
    return os.path.relpath(origin.resolve() / record.name) if origin.is_symlink() else str(record)


def _link(target: Path, link: Path) -> None:
    """Make `link` a relative link to `target`. A folder in its place is kept under another name."""
    if link.is_dir() and not link.is_symlink():
        aside = link.with_name(f"{SUPERSEDED}-{link.name}")
        shutil.rmtree(aside, ignore_errors=True)
        link.rename(aside)
        logger.warning("%s holds other results; they are now in %s. Delete them if you do not need them.", link, aside)
    # renaming a new link over the old one is atomic: a reader always finds one of them
    fresh = link.with_name(f"{disks.partial_name()}link")
    fresh.symlink_to(os.path.relpath(target, link.parent.resolve()))
    os.replace(fresh, link)
