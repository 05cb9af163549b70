"""The layout of the project: pins agree, scripts are thin, modules are short, and imports only go down."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "workflow/scripts/coppice"
# From the bottom up: a module imports from its own layer and from the layers below it.
LAYERS = (
    "core",
    "stats",
    "models",
    "study",
    "render",
    "data",
    "miniature",
    "stages",
    "report",
    "ablation",
    "planning",
    "cli",
)


def pins(path):
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


def test_the_conda_environment_has_the_pins_of_the_requirements():
    environment = yaml.safe_load((ROOT / "envs/coppice.yaml").read_text())
    assert environment["dependencies"][-1]["pip"] == pins("envs/requirements.txt")


def test_every_dependency_is_pinned_exactly_and_in_the_constraints():
    constraints = {line.split("==")[0].lower().replace("_", "-") for line in pins("envs/constraints.txt")}
    for path in ("envs/requirements.txt", "envs/requirements-dev.txt"):
        for line in pins(path):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line), line
            assert line.split("==")[0].lower().replace("_", "-") in constraints, line


@pytest.mark.parametrize("script", sorted((ROOT / "workflow/scripts").glob("*.py")), ids=lambda p: p.stem)
def test_a_script_is_short_and_documented(script):
    text = script.read_text()
    assert len(text.splitlines()) < 40 and ast.get_docstring(ast.parse(text))


MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(parts):
    """Return the place of a module's layer; a module outside all layers may import from every layer."""
    return LAYERS.index(parts[0]) if parts[0] in LAYERS else len(LAYERS)


def test_every_module_is_in_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(LAYERS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_is_short_and_documented_and_imports_only_from_lower_layers(module):
    tree = ast.parse(module.read_text())
    assert len(module.read_text().splitlines()) <= 400
    assert ast.get_docstring(tree), "no module docstring"
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    for layer in imported(tree):
        assert layer_of([layer]) <= layer_of(parts), f"{'.'.join(parts)} imports {layer}, which is a layer above it"


def test_only_these_modules_share_a_name():
    names = [path.stem for path in MODULES if path.stem not in ("__init__", "__main__")]
    assert {name for name in names if names.count(name) > 1} == {"figures"}


def imported(tree):
    """Yield the layers that a module imports from, anywhere in it; a relative import stays inside its layer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "coppice":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            yield from (name for name in names if name != "__version__")


def test_no_relative_import_leaves_its_layer():
    for module in MODULES:
        parts = module.relative_to(PACKAGE).parts
        levels = [node.level for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ImportFrom)]
        assert max(levels, default=0) < max(len(parts), 2), module


def test_only_the_profile_names_partitions_and_accounts():
    files = [path for path in (ROOT / "workflow").rglob("*") if path.suffix in (".py", ".smk", ".yaml")]
    assert not [
        path for path in [*files, *ROOT.glob("config/*.yaml")] if re.search("slurm_|partition:", path.read_text())
    ]


def test_every_rule_file_opens_with_a_docstring():
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        assert path.read_text().startswith('"""'), path.name
