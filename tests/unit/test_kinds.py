"""The seams: stages ask the kind of a model and the recovery, and know no member of either by name."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from coppice import models
from coppice.data import prompts
from coppice.models import kinds
from coppice.stages import evaluate
from coppice.stages.prune import importance

STAGES = Path(evaluate.__file__).parents[1]
# of one kind of model: stages get them from the kind
ACCELERATORS = {
    "causal_lm",
    "packing",
    "prefix_tree",
    "output_head",
    "tree_scoring",
    "text_examples",
    "seq2seq_batches",
    "contrastive",
    "dual_encoder",
    "dual_towers",
}


@pytest.mark.parametrize("name", kinds.KINDS)
def test_a_kind_names_only_rows_and_evaluators_that_there_are(name):
    kind = kinds.named(name)
    assert kind.name == name
    assert set(kind.row_kinds) <= set(prompts.KINDS) and set(kind.evaluators) <= set(evaluate.EVALUATORS)


@pytest.mark.parametrize("module", sorted(STAGES.rglob("*.py")), ids=lambda path: str(path.relative_to(STAGES)))
def test_a_stage_neither_names_a_kind_nor_imports_what_serves_one_kind_only(module):
    tree = ast.parse(module.read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported = {part for node in found for part in (*node.module.split("."), *(alias.name for alias in node.names))}
    assert not texts & set(kinds.KINDS) and not imported & ACCELERATORS


def test_the_kind_is_found_in_a_loaded_model_and_in_its_config_json(tiny_checkpoint):
    source = models.Source(str(tiny_checkpoint("qwen3")))
    assert kinds.of(models.load(source).config) is models.kind_of(source) is kinds.named("causal-lm")


def test_the_first_kind_that_fits_is_taken(monkeypatch):
    """causal-lm fits every model, so that a model of an unknown type fails when it is loaded, with its own error."""
    other = SimpleNamespace(fits=lambda config: getattr(config, "is_encoder_decoder", False))
    members = {"seq2seq": other, "causal-lm": kinds.named("causal-lm")}
    monkeypatch.setattr(kinds, "KINDS", dict.fromkeys(members))
    monkeypatch.setattr(kinds, "named", members.get)
    assert kinds.of(SimpleNamespace(is_encoder_decoder=True)) is other
    assert kinds.of(SimpleNamespace(model_type="unheard-of")) is members["causal-lm"]


def test_scoring_a_tower_changes_neither_its_model_nor_its_configuration(tiny_model, token_batches):
    model = tiny_model("llama")
    (tower,) = kinds.of(model.config).towers(model)
    before = model.config.to_dict()
    importance.taylor(tower, list(tower.parts), token_batches())
    assert model.config.to_dict() == before and len(tower.blocks) == tower.anatomy.blocks
