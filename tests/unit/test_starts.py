"""A job, a plan and a look at a study import only what their own work needs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "workflow" / "scripts"
TORCH = {"torch", "transformers", "datasets", "lm_eval", "peft"}
TABLES = {"numpy", "pandas", "scipy", "matplotlib", "pyarrow"}
# script -> the libraries that it must not import before its work begins; statistics of any kind need numpy
NOT_IMPORTED = {
    "compare_stages": TORCH | TABLES - {"numpy"},
    "fetch_config": TORCH | TABLES,
    "fetch_dataset": TORCH | TABLES,
    "fetch_model": TORCH | TABLES,
    "gather_files": TORCH | TABLES | {"yaml", "pydantic"},
    "import_candidate": TORCH | TABLES,
    "release_weights": TORCH | TABLES,
    "select_best": TORCH | TABLES | {"pydantic"},
    "summarize_selection": TORCH | TABLES | {"pydantic"},
    "write_report": TORCH | TABLES,
}


def modules_after(code):
    """Return the names of the modules that are loaded after `code` has run in a new Python process."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def imports(path):
    """Return the imports of a script, anywhere in it, or of the Python part of a rule file."""
    text = path.read_text()
    if path.suffix == ".smk":
        text = text[: text.index("\nwildcard_constraints:")]
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(ast.unparse(node) for node in nodes if "snakemake" not in ast.unparse(node))


@pytest.mark.parametrize("script", NOT_IMPORTED)
def test_a_script_imports_nothing_that_its_job_does_not_use(script):
    assert not NOT_IMPORTED[script] & modules_after(imports(SCRIPTS / f"{script}.py"))


def test_planning_a_study_imports_no_numerical_library():
    assert not (TORCH | TABLES) & modules_after(imports(ROOT / "workflow/rules/common.smk"))


def test_a_comparison_is_made_and_shown_without_torch(tmp_path):
    code = (
        "from coppice import cli; from synthetic_records import SIX, Synthetic\n"
        f"Synthetic({str(tmp_path)!r}, {{'Llama': SIX['Llama']}}, ('best_acc',), items=20).build()\n"
        f"assert not cli.main(['show', {str(tmp_path)!r}])"
    )
    modules = modules_after(code)
    assert {
        "coppice.stages.compare.comparison",
        "coppice.report.study_report.study_records",
    } <= modules and not TORCH & modules


def test_the_command_line_plans_without_torch():
    code = "from coppice import cli; assert not cli.main(['plan', '--configfile', 'config/full.yaml'])"
    modules = modules_after(f"import os; os.chdir({str(ROOT)!r})\n{code}")
    assert "coppice.planning" in modules and not TORCH & modules
