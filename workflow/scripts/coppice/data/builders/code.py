"""Make a data set of code from source trees: spans to fill in, or whole files.

A file that a filter refuses, and a copy of another file, is left out; the report says which and why. Rows that a model
could answer from memory are left out of held-out roles: no file is on two sides, no training row's context holds a
held-out file, and no held-out row repeats the end and the answer of a row of an earlier role.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Literal

from coppice.core import disks, logs, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError, SettingsError, nearest

from . import code_filters, code_spans, licenses, near_duplicates, source_tree, splitting
from .code_filters import Refusal
from .source_tree import SourceFile

logger = logging.getLogger("coppice.data")

REMEMBERED = 80  # characters before a span by which a held-out row that repeats another one is found
LISTED = 20_000  # files that the report names with their reasons


@dataclass(frozen=True)
class CodeData:
    """What to make of which source trees.

    Attributes:
        source_dirs: folders of the source trees.
        rows: "spans" makes rows {repo, path, kind, prefix, middle, suffix, license} (and context), "files" rows
            {repo, path, text, license} of whole files.
        languages: names of `code_filters.SUFFIXES`; None takes all.
        licenses: SPDX identifiers, `permissive`, or `unknown` for files without a license; None takes every file.
        split_by: what is never on two sides.
        spans_per_file: the most spans of a file.
        context_characters: the most characters of other files of the repository that a row holds as `context`: the
            modules that a Python file imports, then its neighbors in the folder. 0 gives rows without context.
        max_rows: the most rows in all, a sample.
    """

    source_dirs: Sequence[PathLike]
    rows: Literal["spans", "files"] = "spans"
    languages: Sequence[str] | None = None
    licenses: Sequence[str] | None = None
    split_by: Literal["file", "folder", "repository"] = "file"
    spans_per_file: int = 4
    context_characters: int = 0
    max_rows: int | None = None

    def __post_init__(self) -> None:
        """Raise SettingsError for a language that is not known, and for a number out of range."""
        for name in self.languages or ():
            if name not in code_filters.SUFFIXES:
                close = nearest(name, code_filters.SUFFIXES)
                raise SettingsError(f"languages: '{name}' is not one of {', '.join(code_filters.SUFFIXES)}{close}")
        if self.spans_per_file < 1 or self.context_characters < 0 or (self.max_rows is not None and self.max_rows < 1):
            raise SettingsError("spans_per_file and max_rows must be at least 1, and context_characters at least 0")


@dataclass(frozen=True)
class Kept:
    """A file that passed all filters."""

    file: SourceFile
    text: str
    language: str
    license: str

    @property
    def key(self) -> str:
        """Its repository and path."""
        return f"{self.file.repository}/{self.file.path}"


def build_code_data(data: CodeData, target: splitting.Target) -> Record:
    """Write a data set of code; return its report, which is also written beside it.

    Raises:
        SettingsError: a file exists already.
        DataError: a folder is missing, or nothing is left for a role.
    """
    clock = records.Clock()
    target.check_free()
    files = source_tree.files_of(data.source_dirs)
    kept, left_out = _filtered(files, data)
    kept, repeated = _without_duplicates(kept)
    left_out |= repeated
    if not kept:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in _counted(left_out).items()) or "no file is there"
        raise DataError(f"{', '.join(map(str, data.source_dirs))}: no source file is left ({reasons}).")
    rows, repeats = _rows(kept, data, target)
    roots = sorted({(file.repository, file.root) for file in files})
    facts = {
        "sources": [{"repository": name, "commit": source_tree.commit_of(root)} for name, root in roots],
        "choices": asdict(data) | {"source_dirs": [str(folder) for folder in data.source_dirs]},
        "files": {"seen": len(files), "kept": len(kept), "left_out": _counted(left_out)},
        "languages": dict(Counter(one.language for one in kept).most_common()),
        "licenses": dict(Counter(one.license for one in kept).most_common()),
        "kinds": {role: dict(Counter(row.get("kind", "file") for row in own)) for role, own in rows.items()},
        "left_out_rows": repeats,
        "left_out_files": [
            {"file": key, "reason": refusal.reason, "detail": refusal.detail}
            for key, refusal in sorted(left_out.items())
            if refusal.reason != "other file"
        ][:LISTED],
    }
    return target.write(rows, facts, clock)


def _counted(left_out: Mapping[str, Refusal]) -> dict[str, int]:
    """Return reason -> the number of files, the most frequent reason first."""
    return dict(Counter(refusal.reason for refusal in left_out.values()).most_common())


def _filtered(files: Sequence[SourceFile], data: CodeData) -> tuple[list[Kept], dict[str, Refusal]]:
    """Return the files that pass the filters, and for each other one (by repository and path) why it does not."""
    finder, kept, left_out = licenses.Finder(), [], {}
    allow = _allowed(data.licenses)
    for file in logs.progress(files, "reading", len(files), "files"):
        found = _read(file, data.languages, finder, allow)
        if isinstance(found, Kept):
            kept.append(found)
        else:
            left_out[f"{file.repository}/{file.path}"] = found
    return kept, left_out


def _allowed(names: Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    return [spdx for name in names for spdx in (licenses.PERMISSIVE if name == "permissive" else (name,))]


def _read(
    file: SourceFile, languages: Sequence[str] | None, finder: licenses.Finder, allow: Collection[str] | None
) -> Kept | Refusal:
    """Return a file with its text, or why it is left out."""
    language = code_filters.language_of(file.path)
    if language is None:
        return Refusal("other file")
    if languages and language not in languages:
        return Refusal("other language", language)
    if refusal := code_filters.refused_name(file.path):
        return refusal
    try:
        text = code_filters.decoded(file.place.read_bytes())
    except OSError as error:
        return Refusal("cannot be read", disks.explained(error) or str(error.strerror))
    if isinstance(text, Refusal):
        return text
    if refusal := code_filters.refused_text(text):
        return refusal
    spdx = finder.license_of(text, file.place.parent, file.root)
    if allow is not None and not licenses.allowed(spdx, allow):
        return Refusal("license", spdx)
    return Kept(file, text, language, spdx)


def _without_duplicates(kept: Sequence[Kept]) -> tuple[list[Kept], dict[str, Refusal]]:
    """Return one file of each group of equal or nearly equal ones, and what the others repeat."""
    exact, near = near_duplicates.first_of_each([one.text for one in kept])
    left_out = {kept[index].key: Refusal("copy", kept[first].key) for index, first in exact.items()}
    left_out |= {kept[index].key: Refusal("near copy", kept[first].key) for index, first in near.items()}
    return [one for index, one in enumerate(kept) if index not in exact and index not in near], left_out


def _rows(
    kept: Sequence[Kept], data: CodeData, target: splitting.Target
) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Return role -> its rows, and role -> how many of its rows are left out because they repeat another one."""
    rows = {one.key: _rows_of(one, data, target.seed) for one in kept}
    places = [(key, number) for key, own in rows.items() for number in range(len(own))]
    if data.max_rows is not None:
        chosen = splitting.sampled((f"{key} {number}" for key, number in places), data.max_rows, target.seed)
        places = [place for place in places if f"{place[0]} {place[1]}" in chosen]
    groups = {one.key: _group(one.file, data.split_by) for one in kept}
    sizes = Counter(groups[key] for key, _ in places)
    roles = splitting.roles_of(sizes, target.shares, target.seed)
    role_of = {key: roles[group] for key, group in groups.items() if group in roles}
    contexts = _Contexts([one for one in kept if one.key in role_of], role_of, data.context_characters)
    found: dict[str, list[Record]] = {role: [] for role in target.shares}
    seen, repeats = set(), dict.fromkeys(target.shares, 0)
    for role in found:
        for key, number in places:
            if role_of[key] != role:
                continue
            row = rows[key][number]
            mark = (row["prefix"].strip()[-REMEMBERED:], row["middle"]) if "prefix" in row else key
            if mark in seen:
                repeats[role] += 1
                continue
            seen.add(mark)
            found[role].append(row | contexts.of(key))
    return found, {role: count for role, count in repeats.items() if count}


def _group(file: SourceFile, by: str) -> str:
    parts = {"repository": file.repository, "folder": f"{file.repository}/{file.folder}"}
    return parts.get(by) or f"{file.repository}/{file.path}"


def _rows_of(one: Kept, data: CodeData, seed: int) -> list[Record]:
    facts = {"repo": one.file.repository, "path": one.file.path}
    if data.rows == "files":
        return [facts | {"text": one.text, "license": one.license}]
    spans = code_spans.spans(one.text, one.language, data.spans_per_file, f"{seed} {one.key}")
    return [facts | span._asdict() | {"license": one.license} for span in spans]


class _Contexts:
    """Finds what of other files of its repository a row is preceded by.

    A held-out file is context of files of its own role alone.
    """

    def __init__(self, kept: Sequence[Kept], role_of: Mapping[str, str], characters: int) -> None:
        self.role_of, self.characters = role_of, characters
        self.files = {one.key: one for one in kept} if characters else {}
        self.folders: dict[str, list[str]] = {}
        self.modules: dict[str, str] = {}
        self.cache: dict[str, Record] = {}
        for key, one in self.files.items():
            self.folders.setdefault(_group(one.file, "folder"), []).append(key)
            if one.language == "python":
                name = one.file.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                # a package may lie in a folder such as src, so a module is also found by the end of its path
                parts = name.split(".")
                for start in range(len(parts)):
                    self.modules.setdefault(f"{one.file.repository} {'.'.join(parts[start:])}", key)

    def of(self, key: str) -> Record:
        """Return {context: [{path, text}, ...]} of a file, the closest relation last; {} without context."""
        if not self.characters:
            return {}
        if key not in self.cache:
            self.cache[key] = {"context": self._found(self.files[key])}
        return self.cache[key]

    def _found(self, one: Kept) -> list[Record]:
        room, found = self.characters, []
        near = self.folders[_group(one.file, "folder")]
        alike = [key for key in near if self.files[key].language == one.language]
        for key in dict.fromkeys([*self._imported(one), *alike]):
            if key == one.key or self.role_of[key] not in ("train", self.role_of[one.key]) or room <= 0:
                continue
            text = self.files[key].text
            if len(text) > room:  # whole lines
                text = text[: text.rfind("\n", 0, room) + 1]
            if text.strip():
                found.append({"path": self.files[key].file.path, "text": text})
                room -= len(text)
        return found[::-1]

    def _imported(self, one: Kept) -> list[str]:
        if one.language != "python":
            return []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(one.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
        own = PurePosixPath(one.file.path).with_suffix("").parts
        names = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*own[: -node.level], *filter(None, [node.module])]) if node.level else node.module
                names += [f"{base}.{alias.name}" for alias in node.names] + [base]
        known = (self.modules.get(f"{one.file.repository} {name}") for name in names)
        return [key for key in known if key]


def summary(report: Record) -> list[str]:
    """Return the lines that the terminal shows of a report."""
    files = report["files"]
    lines = [f"{files['seen']:,} files seen, {files['kept']:,} kept"]
    lines += [f"  left out, {reason}: {count:,}" for reason, count in files["left_out"].items()]
    lines += [f"licenses: {', '.join(f'{name} {count:,}' for name, count in report['licenses'].items())}"]
    for role, own in report["roles"].items():
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(report["kinds"][role].items()))
        repeats = report["left_out_rows"].get(role)
        lines.append(f"{role}: {own['rows']:,} rows ({kinds})" + (f", {repeats:,} repeats left out" if repeats else ""))
    return lines
