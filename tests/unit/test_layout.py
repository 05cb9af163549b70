"""The house stays readable: pins agree, scripts are thin, modules short, and imports go down only."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "workflow/scripts/coppice"
STOREYS = [
    {
        "claims",
        "disks",
        "errors",
        "parsing",
        "redaction",
        "records",
        "fingerprints",
        "logs",
        "settings",
        "gpus",
        "grids",
        "jobs",
        "large_studies",
        "layout",
        "local_data",
        "sharing",
    },
    {
        "checkpoint_files",
        "models",
        "data",
        "hub",
        "miniature",
        "statistics",
        "output_layer",
        "contrasts",
        "sizes",
        "cost",
        "odd_shapes",
        "prefix_tree",
        "fronts",
        "pairing",
        "phrases",
        "pages",
        "plotting",
        "prompts",
        "estimates",
        "sizing",
    },
    {
        "ablation",
        "candidates",
        "comparison",
        "comparison_text",
        "evaluation",
        "fetching",
        "finetuning",
        "perplexity",
        "pickles",
        "planning",
        "pruning",
        "reporting",
        "selection",
        "tracing",
        "zero_shot",
    },
    {"by_hand", "cli", "__main__", "__init__"},
]


def pins(path):
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


def test_the_conda_environment_has_the_pins_of_the_requirements():
    environment = yaml.safe_load((ROOT / "envs/coppice.yaml").read_text())
    assert environment["dependencies"][-1]["pip"] == pins("envs/requirements.txt")


def test_every_dependency_is_pinned_exactly_and_held_by_the_constraints():
    constraints = {line.split("==")[0].lower().replace("_", "-") for line in pins("envs/constraints.txt")}
    for path in ("envs/requirements.txt", "envs/requirements-dev.txt"):
        for line in pins(path):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line), line
            assert line.split("==")[0].lower().replace("_", "-") in constraints, line


@pytest.mark.parametrize("script", sorted((ROOT / "workflow/scripts").glob("*.py")), ids=lambda p: p.stem)
def test_a_script_is_thin_and_says_what_it_does(script):
    text = script.read_text()
    assert len(text.splitlines()) < 40 and ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_is_short_documented_and_imports_only_downwards(module):
    tree = ast.parse(module.read_text())
    assert len(module.read_text().splitlines()) <= 400
    assert ast.get_docstring(tree), "no module docstring"
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    own = storey_of(parts[0])
    for name in imported(tree, parts):
        assert storey_of(name) <= own, f"{'.'.join(parts)} imports {name}, which stands above it"


def storey_of(name):
    return next(level for level, names in enumerate(STOREYS) if name in names)


def imported(tree, parts):
    """Top-level names of the package that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = parts[: len(parts) - node.level]
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            if not inside:
                yield from (name for name in names if not name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coppice":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_partitions_and_accounts_stand_in_the_profile_alone():
    files = [path for path in (ROOT / "workflow").rglob("*") if path.suffix in (".py", ".smk", ".yaml")]
    assert not [
        path for path in [*files, *ROOT.glob("config/*.yaml")] if re.search("slurm_|partition:", path.read_text())
    ]


def test_every_rule_file_opens_with_its_contract():
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        assert path.read_text().startswith('"""'), path.name


def test_the_readme_has_a_line_for_every_file_of_the_workflow():
    text = (ROOT / "README.md").read_text()
    names = [path.name for path in (ROOT / "workflow").rglob("*") if path.suffix in (".py", ".smk")]
    assert not [name for name in names if name != "__init__.py" and f" {name} " not in text]
