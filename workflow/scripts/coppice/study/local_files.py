"""Find the local files that hold a split of a data set, by file name. Settings and jobs share this rule."""

import re
from pathlib import Path

from coppice.core.aliases import PathLike
from coppice.core.errors import SettingsError

FORMATS = {"json": ("*.json", "*.jsonl"), "csv": ("*.csv",), "parquet": ("*.parquet",), "text": ("*.txt", "*.txt.gz")}
_PART = re.compile(r"-\d{5}-of-\d{5}\b")  # a numbered part of a split that is stored in several files


def files_of(path: PathLike, form: str, split: str) -> list[Path]:
    """Return the files of `split` at `path`.

    If `path` is a file, that is the file. In a folder it is the file called `split`, else every data file that has
    `split` as one part of its name.

    Raises:
        SettingsError: several files match and they are not numbered parts of one split.
    """
    path = Path(path).expanduser().absolute()
    if path.is_file():
        return [path]
    if (path / split).is_file():
        return [path / split]
    found = sorted(file for pattern in FORMATS[form] for file in path.glob(pattern) if file.is_file())
    found = [file for file in found if split in _words(file.name)]
    if len(found) > 1 and not all(_PART.search(file.name) for file in found):
        raise SettingsError(
            f"{path}: several files match the split '{split}': {', '.join(file.name for file in found)}. Name one of "
            "them under splits, or move the others away."
        )
    return found


def _words(filename: str) -> list[str]:
    """Return the parts of a file name between dots, dashes and underscores: `ptb.train.txt.gz` contains `train`."""
    for separator in "-_":
        filename = filename.replace(separator, ".")
    return filename.split(".")
