"""Which files of the user's hold a split of a data set, by their names: settings and jobs agree on them."""

import re
from pathlib import Path

from coppice.core.errors import SettingsError

FORMATS = {"json": ("*.json", "*.jsonl"), "csv": ("*.csv",), "parquet": ("*.parquet",), "text": ("*.txt", "*.txt.gz")}
_PART = re.compile(r"-\d{5}-of-\d{5}\b")  # of a split that lies in several files


def files_of(path, form, split):
    """The files of `split` at `path`: the file itself, one named so in the folder, or that whose name has the split's.

    Raises SettingsError where several files would do and they are not the numbered parts of one.
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
            f"{path}: {', '.join(file.name for file in found)} may each be the split '{split}'; name one of them in "
            "its place, or move the others away"
        )
    return found


def _words(filename):
    """The parts of a file name between dots, dashes, underscores: `ptb.train.txt.gz` has `train`."""
    for separator in "-_":
        filename = filename.replace(separator, ".")
    return filename.split(".")
