"""Take over results that an earlier version of Coppice left in the folders of configs.

It trained and evaluated the candidate of each config in the config's own folder. Now each candidate has a folder (see
`layout.by_candidate`). The jobs that would train or evaluate a candidate first move such results there. What is
finished is then only checked and written again: trainings continue from their checkpoints, and evaluations keep their
finished parts.
"""

import glob
import logging
import shutil
from pathlib import Path

from coppice.core import records
from coppice.core.aliases import PathLike

from . import layout

logger = logging.getLogger("coppice.layout")

# What a job leaves in its folder besides the outputs that Snakemake deletes before the job starts
BEGUN = {"training": ".training_key.json", "pruned": ".parts", "finetuned": ".parts"}
OF_CONFIG = ("seed-*", layout.COMPARISON, "comparison_report.txt")  # not moved: they stay the config's own


def adopt(kind: str, candidate: PathLike, output: PathLike) -> None:
    """Move the earlier results of a candidate from the folder of a config to `output`, unless `output` has its own.

    Args:
        kind: training, pruned or finetuned.
        candidate: path of its pruning.json.
        output: its folder for results of this kind, as from `layout.by_candidate`.
    """
    output = Path(output)
    if (output / BEGUN[kind]).exists():
        return
    record = records.read(candidate)
    results, *_ = str(output).rpartition(f"/{layout.BY_CANDIDATE}/")
    pattern = layout.folder(glob.escape(results), kind).format(model=glob.escape(record["model"]), config="*")
    seed = output.name if output.name.startswith("seed-") else ""
    for folder in map(Path, sorted(glob.glob(f"{pattern}/{seed}"))):
        if (folder / BEGUN[kind]).exists() and _weights(folder / layout.RECORDS[kind][1]) == record[
            "weights_fingerprint"
        ]:
            logger.info("taking over the results of candidate %s from %s", record["candidate"], folder)
            _move(folder, output)
            return


def _weights(path: Path) -> str | None:
    """Return the fingerprint of the checkpoint that a record of an earlier version is about; None without a record."""
    try:
        return records.read(path)["provenance"]["fingerprints"]["weights"]
    except (records.RecordError, KeyError):
        return None


def _move(folder: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if not any(path.match(pattern) for pattern in OF_CONFIG):
            shutil.move(path, output / path.name)
