"""Link a candidate's training or evaluation into the folder of a config that chose the candidate."""

import logging
from collections.abc import Iterable
from pathlib import Path

from coppice.core import mirror, records
from coppice.core.aliases import PathLike, Record

logger = logging.getLogger("coppice.selection")

# A folder's main record -> all its records that name the config. The main one is written last: whoever finds it also
# finds the files that belong to it.
NAMED = {
    "finetuning_config.json": ("training_state.json", "finetuning_config.json"),
    "evaluation_results.json": ("ppl_results.json", "evaluation_results.json"),
}


def link(identity: Record, record: PathLike, folder: PathLike, before: Iterable[PathLike]) -> None:
    """Fill the folder of a config with links to a candidate's results, and with its records under the config's name.

    If a config before this one chose the same candidate, the records name it as `reused_from`, so that the cost of the
    shared job is counted once.

    Args:
        identity: {model, config}.
        record: path of the candidate's `finetuning_config.json` or `evaluation_results.json`.
        folder: the config's folder.
        before: paths of the selections of the configs before this one.
    """
    record = Path(record)
    candidate = records.read(record)["candidate"]
    others = [chosen["config"] for chosen in map(records.read, before) if chosen["candidate"] == candidate]
    origin = {"reused_from": others[0]} if others else {}
    mirror.show(record.parent, folder, identity | origin, NAMED[record.name], own=("seed-*",))
    logger.info("%s %s chose %s; its results are in %s", *identity.values(), candidate, record.parent)


def forget_stale(folders: Iterable[PathLike]) -> None:
    """Delete the records in folders of configs whose candidates' records are gone.

    Snakemake does not make a missing file again that only finished jobs needed. Without the config's record, it does.
    """
    for folder in map(Path, folders):
        for name in {name for names in NAMED.values() for name in names}:
            if (folder / mirror.ORIGIN).is_symlink() and not (folder / mirror.ORIGIN / name).exists():
                (folder / name).unlink(missing_ok=True)
