"""Recognize files of pickled Python objects, such as whole models, from their opcodes and without loading them.

`torch.save` writes a pickle, whose tensors lie beside it in a zip archive or, in older files, behind it. A file of
tensors names only the functions that rebuild tensors. A file that names any other class or function can run any code
when it is loaded, so Coppice never loads it. This module says what such a file holds and how to convert it.
"""

from __future__ import annotations

import pickletools
import re
import shlex
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError

CONVERT = "python contrib/import_pickle/import_pickle.py {} OUT --i-trust-this-file"
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".tar")
# What `torch.load` accepts with `weights_only=True`: whatever rebuilds tensors, and plain collections
OF_TENSORS = re.compile(
    r"torch\._utils\.\w+|torch\._tensor\.\w+|torch\.storage\.\w+|torch\.\w*Storage|torch\.nn\.parameter\.\w*Parameter"
    r"|torch\.(Size|Tensor|device|strided|bool|(b?float|complex|q?u?int)\w*)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|(__builtin__|builtins)\.(set|bytearray|complex)"
)
LEGACY_PICKLES = 4  # of an old file of torch: a magic number, the protocol, facts about the system, and the content
SHOWN = 3  # classes that a message names


@dataclass(frozen=True)
class Content:
    """What a pickle would import if it were loaded, besides the parts of tensors.

    Attributes:
        objects: the dotted names of these classes and functions, in the order in which they appear; empty if the file
            holds only tensors and plain values.
        program: whether it is a TorchScript program.
    """

    objects: tuple[str, ...]
    program: bool = False


def read(path: Path) -> Content | None:
    """Return what a file would import, without importing it; None if the file is not a pickle, or damaged."""
    try:
        if zipfile.is_zipfile(path):
            return _of_archive(path)
        with open(path, "rb") as file:
            if file.read(1) not in (b"\x80", b"(", b"c", b"]", b"}"):  # how pickles of all protocols begin
                return None
            file.seek(0)
            return Content(_foreign(file, LEGACY_PICKLES))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # a damaged file is reported by whoever reads its tensors


def check(path: Path) -> None:
    """Raise CheckpointError if a file of weights holds other pickled objects than tensors."""
    content = read(path)
    if content and content.objects:
        raise CheckpointError(refusal(path, content))


def found_in(folder: Path) -> Path | None:
    """Return a file of `folder` that holds other pickled objects than tensors; None if there is none."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return next((path for path in paths if (content := read(path)) and content.objects), None)


def refusal(path: Path, content: Content) -> str:
    """Return the message about a file that holds other objects than tensors."""
    if content.program:
        return (
            f"{path}: is a TorchScript program, which cannot be pruned or trained. Save the original model with "
            "save_pretrained and name that folder."
        )
    more = " and others" if len(content.objects) > SHOWN else ""
    return (
        f"{path}: is a pickle of Python objects ({', '.join(content.objects[:SHOWN])}{more}), for example of a whole "
        "model, not a file of tensors. Coppice does not load it because it can run any code. If you trust whoever made "
        f"it, convert it to a checkpoint folder first: {conversion(path)}"
    )


def conversion(path: PathLike) -> str:
    """Return the command that converts a pickle, as a shell takes it."""
    return CONVERT.format(shlex.quote(str(path)))


def _of_archive(path: Path) -> Content | None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        main = next((name for name in names if name.rpartition("/")[2] == "data.pkl"), None)
        if main is None:
            return None
        with archive.open(main) as file:
            objects = _foreign(file, 1)
    return Content(objects, any(name.rpartition("/")[2] == "constants.pkl" for name in names))


def _foreign(file: IO[bytes], pickles: int) -> tuple[str, ...]:
    """Return the dotted names that the next `pickles` pickles in a file import, without those of tensors."""
    found: dict[str, None] = {}
    for _ in range(pickles):
        # after the only pickle of a file that torch did not write there is nothing, or something else
        with suppress(ValueError, EOFError):
            for name in _imports(file):
                if not OF_TENSORS.fullmatch(name):
                    found[name] = None
                if len(found) > SHOWN:  # a pickled model may hold its tensors, too: do not read those
                    return tuple(found)
    return tuple(found)


def _imports(file: IO[bytes]) -> Iterator[str]:
    """Yield the dotted name of everything that a pickle imports, from its opcodes alone."""
    texts = ["", ""]  # the last two on the stack, which STACK_GLOBAL takes
    memo: dict[int, str] = {}
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(value).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[1]
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(value)] = texts[1]
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            texts = [texts[1], memo.get(int(value), "")]
        elif isinstance(value, str):
            texts = [texts[1], value]
