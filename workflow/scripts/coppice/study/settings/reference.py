"""Make the tables of config/README.md and the editor's schema, config/schema.json, from the models of the sections.

`python -m coppice.study.settings.reference` rewrites both files.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from coppice.core.aliases import Json

from .checking import dotted
from .keys import Key, every_key, reruns
from .sections import Config
from .sections.forms import KINDS

FOLDER = Path(__file__).parents[5] / "config"
BEGIN, END = "<!-- keys: begin, made by python -m coppice.study.settings.reference -->", "<!-- keys: end -->"


def tables() -> str:
    """Return the Markdown tables of all keys, one for each top-level section."""
    rows = [key for key in every_key() if not _is_redundant(key)]
    plain = [key for key in rows if len(key.path) == 1 and not key.is_section]
    parts = ["### Top level\n", _table(plain)]
    for section, group in groupby(rows, key=lambda key: key.path[0]):
        head, *keys = group
        if keys:
            parts += [f"### `{section}`\n", head.description + "\n", _table(keys)]
    return "\n".join(parts)


def _is_redundant(key: Key) -> bool:
    """Return whether a key's row would repeat others.

    A model's own grid and sections have the keys of those of the study, `base` has those of an arm, and an entry that
    the user names has no meaning besides that of its keys.
    """
    path = key.path
    own = path[:1] == ("models",) and path[2:3] in (("prune[]",), ("calibration",), ("finetune",), ("evaluate",))
    repeated = (own or path[2:3] == ("base",)) and (len(path) > 3 or path[2] == "prune[]")
    return repeated or (path[-1] == "<name>" and key.is_section)


def page(text: str) -> str:
    """Return the page `text` with its tables rewritten."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


def _table(rows: Iterable[Key]) -> str:
    lines = ["| key | type | default | meaning | reruns |", "|---|---|---|---|---|"]
    for key in rows:
        stages = "" if key.is_section else ", ".join(reruns(key.path))
        cells = (f"`{dotted(key.path)}`", _type(key), _default(key), key.description, stages)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(key: Key) -> str:
    if key.form.choices:
        return ", ".join("null" if value is None else f"`{value}`" for value in key.form.choices)
    words = {kind: word if kind == "boolean" else word.split(" ")[-1] for kind, word in KINDS.items()}
    text = " or ".join(words[kind] for kind in key.form.kinds) + (f" ({key.unit})" if key.unit else "")
    bounds = [f"{word} {bound}" for word, bound in key.bounds]
    return text + (f", {' and '.join(bounds)}" if bounds else "")


def _default(key: Key) -> str:
    if key.required:
        return "must be given" if key.path[-1] != "<name>" else ""
    if key.is_inherited or (key.form.section and key.is_section):
        return ""
    return f"`{json.dumps(key.default, default=_written)}`".replace('"', "")


def _written(section: BaseModel) -> dict[str, Any]:
    """Return the keys of a default that differ from those of the section."""
    return section.model_dump(exclude_unset=True)


# Pydantic adds the bounds of a `Number` under its own names
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def schema() -> str:
    """Return the JSON schema of a configuration file, for editors."""
    whole = _for_overlays(Config.model_json_schema(by_alias=True))
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | whole, indent=1) + "\n"


def _for_overlays(node: Json) -> Json:
    """Return a part of the schema as it holds for one file among several.

    A file may override another one: no key must be in it, and null drops an entry that the other one defines.
    """
    if isinstance(node, list):
        return [_for_overlays(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {BOUNDS.get(key, key): _for_overlays(value) for key, value in node.items() if key != "required"}
    if isinstance(found.get("title"), str):
        del found["title"]  # the key in other words
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = {"anyOf": [found["additionalProperties"], {"type": "null"}]}
    return found


def main(argv: list[str] | None = None) -> int:
    """Rewrite the files, or with `--check` report whether one is out of date. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m coppice.study.settings.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(argv).check
    readme, editor = FOLDER / "README.md", FOLDER / "schema.json"
    fresh = {readme: page(readme.read_text(encoding="utf-8")), editor: schema()}
    old = [file for file, text in fresh.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in old:
        if check:
            print(f"{file}: is out of date; run `{parser.prog}`", file=sys.stderr)
        else:
            file.write_text(fresh[file], encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
