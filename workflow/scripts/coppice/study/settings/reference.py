"""Make the tables of config/README.md from the schema: `python -m coppice.study.settings.reference` rewrites them."""

import argparse
import json
import sys
from itertools import groupby

from . import rerun_policy, schema

PAGE = schema.SCHEMA_FILE.parents[2] / "config" / "README.md"
BEGIN, END = "<!-- keys: begin, made by python -m coppice.study.settings.reference -->", "<!-- keys: end -->"


def tables():
    """Return the Markdown tables of all keys, one for each top-level section."""
    rows = [row for row in schema.key_paths() if not _is_redundant(*row)]
    plain = [row for row in rows if len(row[0]) == 1 and not schema.is_mapping(row[1])]
    parts = ["### Top level\n", _table(plain)]
    for section, group in groupby(rows, key=lambda row: row[0][0].removesuffix("[]")):
        (_, head), *keys = group
        if keys:
            parts += [f"### `{section}`\n", _described(head) + "\n", _table(keys)]
    return "\n".join(parts)


def _is_redundant(path, node):
    """Return whether a key's row would repeat others.

    A model's own grid has the keys of candidates.prune, `base` those of an arm, and an entry that the user names has no
    meaning besides that of its keys.
    """
    repeated = path[:3] == ("models", "<name>", "prune[]") or (path[2:3] == ("base",) and len(path) > 3)
    return repeated or (path[-1] == "<name>" and schema.is_mapping(node))


def page(text):
    """Return the page `text` with its tables rewritten."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


def _table(rows):
    lines = ["| key | type | default | meaning | reruns |", "|---|---|---|---|---|"]
    for path, node in rows:
        reruns = "" if schema.is_mapping(node) else ", ".join(rerun_policy.reruns(path))
        cells = (f"`{schema.dotted(path)}`", _type(node), _default(path, node), _described(node), reruns)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(node):
    if "enum" in node:
        return ", ".join("null" if value is None else f"`{value}`" for value in node["enum"])
    types = [kind for kind in schema.KINDS if kind in schema.types_of(node)]
    text = " or ".join(schema.KINDS[kind].split(" ")[-1] if kind != "boolean" else "true or false" for kind in types)
    bounds = [f"{word} {node[limit]}" for limit, word in schema.LIMITS.items() if limit in node]
    return text + (f", {' and '.join(bounds)}" if bounds else "")


def _default(path, node):
    if "default" in node:
        return f"`{json.dumps(node['default'])}`".replace('"', "")
    return "must be given" if path[-1] in _around(path).get("required", ()) else ""


def _around(path):
    """Return the schema of the mapping that contains the key at `path`."""
    node = schema.schema()
    for part in path[:-1]:
        name = part.removesuffix("[]")
        node = node["additionalProperties"] if name == "<name>" else node["properties"][name]
        node = node["items"] if part != name else node
    return node


def _described(node):
    return " ".join(node["description"].split())


def main(argv=None):
    """Rewrite the page, or with `--check` report whether it is out of date. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m coppice.study.settings.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if they are out of date")
    check = parser.parse_args(argv).check
    found = PAGE.read_text(encoding="utf-8")
    fresh = page(found)
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
    elif fresh != found:
        print(f"{PAGE}: is out of date; run `{parser.prog}`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
