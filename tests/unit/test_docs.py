"""The documentation shows commands, files, links and configuration keys that exist, and the README is one page."""

import ast
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [
    README,
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("config/README.md", "contrib/README.md", "SECURITY.md")),
]
COMMANDS = (
    "snakemake --cores 8 --resources gpu=2",
    "snakemake results/finetuned_evaluation/Llama/best_acc_finetuned/comparison_report.txt",
    "snakemake --profile profiles/slurm",
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# `models.Llama.dtype`, but not `model.json`, `average_acc` or `ppl.wikitext2`
DOTTED = re.compile(r"`([a-z_]+(?:\.[A-Za-z_<>]+)+)`")

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def load_hook():
    """Return the module that puts files from outside docs/ into the site."""
    spec = importlib.util.spec_from_file_location("include", DOCS / "_site/include.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


HOOK = load_hook()


@functools.cache
def text_of(page):
    """Return a page's text as the site shows it, with the files that it includes."""
    text = page.read_text(encoding="utf-8")
    here = page.relative_to(ROOT).as_posix()
    return HOOK.INCLUDE.sub(lambda found: HOOK.included(found[1], here), text)


@functools.cache
def anchors(page):
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@functools.cache
def schema():
    """Return the configuration's schema."""
    return json.loads((ROOT / "config/schema.json").read_text(encoding="utf-8"))


def members(node):
    """Return the parts of the schema that describe a node: what it refers to, and each member of a union."""
    if "$ref" in node:
        return members(schema()["$defs"][node["$ref"].rpartition("/")[2]])
    union = node.get("anyOf", []) + node.get("oneOf", [])
    return [node, *(part for member in union for part in members(member))]


def schema_has(parts):
    """Return True if the schema has a key at the path `parts`; a part may be a name of the user's, or `<any>`."""
    nodes = [schema()]
    for part in parts:
        within = [member for node in nodes for member in members(node)]
        nodes = []
        for node in within:
            named, others = node.get("properties", {}), node.get("additionalProperties")
            nodes += named.values() if part[0] == "<" else [named[part]] if part in named else []
            nodes += [others] if isinstance(others, dict) and part not in named else []
    return bool(nodes)


def keys(settings, above=()):
    """Yield the paths of all keys in a piece of configuration, without those inside lists."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield (*above, key)
            yield from keys(value, (*above, key))


def test_the_readme_is_one_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 16 * 1024


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_shows_the_commands_word_for_word(command):
    assert command in README.read_text(encoding="utf-8").splitlines()


@by_name
def test_links_lead_to_files_and_headings_that_exist(page):
    text = FENCE.sub("", text_of(page))
    for link in [*LINK.findall(text), *IMAGE.findall(text)]:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@by_name
def test_pages_of_the_site_link_to_nothing_outside_it(page):
    if DOCS in page.parents:
        links = LINK.findall(FENCE.sub("", text_of(page)))
        for link in (link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)):
            assert DOCS in Path(os.path.normpath(page.parent / link)).parents, link


@by_name
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert target in targets, target


@functools.cache
def subcommands():
    """Return the names that the command line gives to `add_parser`."""
    calls = [
        node
        for path in (ROOT / "workflow/scripts/coppice/cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_parser"
    ]
    return {call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)}


@by_name
def test_subcommands_exist(page):
    for command in re.findall(r"(?:^|`)coppice ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert command in subcommands(), command


def test_the_page_of_commands_has_every_subcommand():
    text = (DOCS / "reference/commands.md").read_text(encoding="utf-8")
    assert subcommands() and all(f"| `coppice {name}` |" in text for name in subcommands())


@by_name
def test_configuration_files_exist(page):
    for files in re.findall(r"--configfile ((?:[\w./-]+\.yaml ?)+)", page.read_text(encoding="utf-8")):
        for file in files.split():
            assert not file.startswith("config/") or (ROOT / file).is_file(), file


@by_name
def test_configuration_keys_exist(page):
    for key in DOTTED.findall(page.read_text(encoding="utf-8")):
        if key.split(".")[0] in schema()["properties"] and not key.endswith((".yaml", ".json", ".tsv")):
            assert schema_has(key.split(".")), key


@by_name
def test_pieces_of_configuration_have_keys_that_exist(page):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for piece in [*blocks, *re.findall(r"`([a-z_]+: \{[^`]*\})`", FENCE.sub("", text))]:
        found = list(keys(yaml.safe_load(piece)))
        if found[0][0] in schema()["properties"]:
            assert all(schema_has(path) for path in found), piece


def test_the_navigation_names_every_page_once():
    named = []

    def collect(node):
        if isinstance(node, str):
            named.append(node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            collect(child)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_included_files_exist():
    texts = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
    assert sorted(found for text in texts for found in HOOK.INCLUDE.findall(text)) == sorted(HOOK.PAGES)
