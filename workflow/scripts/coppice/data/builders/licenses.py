"""Find out under which license a source file is: by its own header, else by the nearest license file above it.

The answer is an SPDX expression or UNKNOWN. It reads a file's statement, and is no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

UNKNOWN = "unknown"
PERMISSIVE = ("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0")
PERMISSIVE += ("PSF-2.0", "Python-2.0", "Unlicense", "Zlib")

HEADER_LINES = 30
LONGEST = 200_000  # characters of a license file that are read
# the names of license files, the first of which decides if a folder has several
NAMED = re.compile(r"(?:licen[cs]es?|copying|unlicense)(?:[.-].*)?", re.IGNORECASE)
SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+() -]+?)[ \t]*(?:\*/|-->|#}|$)", re.MULTILINE)
# phrase of a license's text, with every run of other characters than letters and digits as one space -> SPDX
# identifier. The phrase that occurs first decides, since licenses mention others further down; of several that begin
# at one place it is the longest.
PHRASES = {
    "gnu affero general public license": "AGPL-3.0-only",
    "gnu lesser general public license version 2 1": "LGPL-2.1-only",
    "gnu lesser general public license": "LGPL-3.0-only",
    "gnu library general public license": "LGPL-2.0-only",
    "gnu general public license version 2": "GPL-2.0-only",
    "gnu general public license as published by the free software foundation either version 2": "GPL-2.0-or-later",
    "gnu general public license": "GPL-3.0-only",
    "mozilla public license version 2 0": "MPL-2.0",
    "eclipse public license v 2 0": "EPL-2.0",
    "apache license version 2 0": "Apache-2.0",
    "boost software license version 1 0": "BSL-1.0",
    "python software foundation license version 2": "PSF-2.0",
    "this is free and unencumbered software released into the public domain": "Unlicense",
    "cc0 1 0 universal": "CC0-1.0",
    "permission to use copy modify and or distribute this software for any purpose with or without fee": "ISC",
    "permission is hereby granted free of charge to any person obtaining a copy": "MIT",
    "this software is provided as is without any express or implied warranty in no event will the authors": "Zlib",
}
PHRASES["redistribution and use in source and binary forms with or without modification are permitted"] = "BSD"
BSD_THIRD = re.compile(r"\b(?:neither the names?|the names? of .{1,100} may not be used)\b")
# only if nothing else of a license is there
SHORT = {"bsd license": "BSD-3-Clause", "bsd 3 clause": "BSD-3-Clause", "mit license": "MIT"}


class Finder:
    """Finds the licenses of files, and reads each license file once."""

    def __init__(self) -> None:
        """Begin without having read any file."""
        self.folders: dict[Path, str | None] = {}

    def license_of(self, text: str, folder: Path, root: Path) -> str:
        """Return the license of a source file.

        Args:
            text: its text.
            folder: its folder.
            root: the folder of its repository, above which no license is looked for.
        """
        header = "\n".join(text[:LONGEST].splitlines()[:HEADER_LINES])
        return recognized(header) or self._inherited(folder, root) or UNKNOWN

    def _inherited(self, folder: Path, root: Path) -> str | None:
        if folder not in self.folders:
            found = None
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                if NAMED.fullmatch(file.name) and file.is_file() and file.suffix not in (".py", ".js", ".go", ".rs"):
                    with open(file, encoding="utf-8", errors="replace") as content:
                        found = found or recognized(content.read(LONGEST))
            if found is None and folder != root and root in folder.parents:
                found = self._inherited(folder.parent, root)
            self.folders[folder] = found
        return self.folders[folder]


def recognized(text: str) -> str | None:
    """Return the SPDX expression of the license that a text states or is; None if it states none."""
    if named := SPDX.search(text):
        return named[1].strip()
    words = re.sub(r"[^a-z0-9]+", " ", text.lower())
    places = [(words.index(phrase), -len(phrase), spdx) for phrase, spdx in PHRASES.items() if phrase in words]
    if not places:
        return next((spdx for phrase, spdx in SHORT.items() if phrase in words), None)
    found = min(places)[2]
    if found == "BSD":
        return "BSD-3-Clause" if BSD_THIRD.search(words) else "BSD-2-Clause"
    return found


def allowed(expression: str, allow: Collection[str]) -> bool:
    """Return whether a list of SPDX identifiers allows an expression: one side of an OR, both sides of an AND."""
    names = {name.lower() for name in allow}
    plain = re.sub(r"[()]", " ", expression)
    return any(
        all(part.split(" WITH ")[0].strip().lower() in names for part in re.split(r"\sAND\s", choice))
        for choice in re.split(r"\sOR\s", plain)
    )
