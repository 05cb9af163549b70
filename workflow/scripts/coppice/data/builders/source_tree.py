"""Find the files of source trees, and the repository that each belongs to.

Of a git repository these are the files that git tracks. Of any other tree they are all files that no `.gitignore` file
of the tree excludes. Links are never followed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.core.errors import DataError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

# `-c` outranks the repository's own settings: no program that a repository names may run, and it does not matter who
# owns its files.
GIT = ("git", "-c", "core.fsmonitor=false", "-c", "safe.directory=*")


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file of a source tree.

    Attributes:
        repository: the name of its repository, or of its tree if that is not a git repository.
        path: its path in the repository, with slashes.
        root: the repository's folder.
    """

    repository: str
    path: str
    root: Path

    @property
    def place(self) -> Path:
        """Where the file is."""
        return self.root / self.path

    @property
    def folder(self) -> str:
        """Its folder in the repository; "." for the repository's own."""
        return str(PurePosixPath(self.path).parent)


def files_of(folders: Sequence[PathLike]) -> list[SourceFile]:
    """Return the files of source trees in the order of repository and path, each file once.

    A tree may be a repository, a folder in one, or a folder that holds several.

    Raises:
        DataError: a folder does not exist, or two repositories of different places have one name.
    """
    found: dict[Path, SourceFile] = {}
    roots: dict[str, Path] = {}
    for folder in folders:
        tree = Path(folder).expanduser()
        if not tree.is_dir():
            raise DataError(f"{folder}: there is no such folder. Name the folder of a source tree.")
        for file in _files(tree.resolve()):
            other = roots.setdefault(file.repository, file.root)
            if other != file.root:
                raise DataError(
                    f"{other} and {file.root} are both called {file.repository}, so their rows could not be told "
                    "apart. Rename one of the folders."
                )
            found[file.place] = file
    return sorted(found.values())


def _files(tree: Path) -> Iterator[SourceFile]:
    """Yield the files of a tree."""
    root = _git_root(tree)
    tracked = _tracked(tree) if root else []
    if root and tracked:
        inside = tree.relative_to(root)
        for path in tracked:
            place = tree / path
            if place.is_dir() and not place.is_symlink():  # a submodule
                yield from _files(place)
            elif place.is_file() and not place.is_symlink():
                yield SourceFile(root.name, (inside / path).as_posix(), root)
        return
    # Not a repository; or a folder that its repository ignores, such as installed packages, which the user asks for.
    yield from _walked(tree, tree, [])


def _walked(root: Path, folder: Path, ignored: Sequence[tuple[Path, GitIgnoreSpec]]) -> Iterator[SourceFile]:
    """Yield the files below `folder` of the tree `root`, except those that match the patterns of `ignored`."""
    import pathspec

    rules = folder / ".gitignore"
    if rules.is_file():
        lines = rules.read_text(encoding="utf-8", errors="replace").splitlines()
        ignored = [*ignored, (folder, pathspec.GitIgnoreSpec.from_lines(lines))]
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        place, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        if entry.name == ".git" or _excluded(place, is_folder, ignored):
            continue
        if is_folder and (place / ".git").exists():
            yield from _files(place)
        elif is_folder:
            yield from _walked(root, place, ignored)
        elif entry.is_file(follow_symlinks=False):
            yield SourceFile(root.name, place.relative_to(root).as_posix(), root)


def _excluded(place: Path, is_folder: bool, ignored: Sequence[tuple[Path, GitIgnoreSpec]]) -> bool:
    """Return whether a file or folder is ignored; the innermost `.gitignore` that says anything about it decides."""
    for folder, rules in reversed(ignored):
        name = place.relative_to(folder).as_posix() + ("/" if is_folder else "")
        verdict = rules.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _git_root(tree: Path) -> Path | None:
    """Return the folder of the git repository that a folder lies in; None if it lies in none or git is missing."""
    found = _git(tree, "rev-parse", "--show-toplevel")
    return Path(os.fsdecode(found.removesuffix(b"\n"))) if found is not None else None


def _tracked(tree: Path) -> list[str]:
    """Return the paths, relative to `tree`, of the files below it that git tracks."""
    listed = _git(tree, "ls-files", "-z", "--cached") or b""
    return sorted({os.fsdecode(path) for path in listed.split(b"\0") if path})


def commit_of(root: Path) -> str | None:
    """Return the commit that a repository's folder is at; None if it is no repository or has no commit."""
    found = _git(root, "rev-parse", "--verify", "HEAD")
    return found.decode().strip() if found is not None else None


def _git(folder: Path, *words: str) -> bytes | None:
    """Return what a git command prints; None if it fails or git is not installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run([*GIT, *words], cwd=folder, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
