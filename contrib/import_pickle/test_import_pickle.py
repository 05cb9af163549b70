"""LLM-Pruner's pickle becomes a checkpoint folder if its user trusts it, and is rejected everywhere else."""

import ast
import subprocess
import sys
from pathlib import Path

import import_pickle
import pytest
import torch
from torch import nn

import coppice
from coppice.core.errors import CheckpointError
from coppice.models import pruned_shapes
from tests.unit.test_odd_shapes import IDS, load, narrow


class Pruned(nn.Module):
    """A model of a pruning tool's own class: it is not a class of transformers, but has the usual names of parts."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head, self.config = model.model, model.lm_head, model.config


@pytest.fixture
def pickled(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama")
    narrow(model.model.layers[0], 2, 2, 20)
    narrow(model.model.layers[3], 1, 2, 31)
    torch.save({"model": Pruned(model), "tokenizer": tiny_tokenizer}, tmp_path / "pytorch_model.bin")
    return model, tmp_path / "pytorch_model.bin"


def test_converts_a_pickle_to_a_checkpoint_with_the_same_logits(pickled, tmp_path, capsys):
    model, path = pickled
    assert import_pickle.main([str(path), str(tmp_path / "out"), "--i-trust-this-file"]) == 0
    assert "2 of them with other widths" in capsys.readouterr().out
    assert torch.equal(load(tmp_path / "out")(IDS).logits, model(IDS).logits)
    assert (tmp_path / "out" / pruned_shapes.MANIFEST).is_file()
    assert not list(tmp_path.glob(".*partial"))


def test_does_not_open_a_pickle_that_the_user_does_not_trust(pickled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was unpickled"))
    assert import_pickle.main([str(pickled[1]), str(tmp_path / "out")]) == 1
    assert "--i-trust-this-file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_does_not_write_into_a_folder_that_is_not_empty(pickled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        import_pickle.convert(pickled[1], tmp_path / "out", trusted=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [([1, 2], "without a model"), ({"model": nn.Linear(2, 2)}, "of type None"), (None, "without")],
)
def test_rejects_a_pickle_without_a_model(tmp_path, content, expected):
    torch.save(content, tmp_path / "in.bin")
    with pytest.raises(CheckpointError, match=expected):
        import_pickle.convert(tmp_path / "in.bin", tmp_path / "out", trusted=True)
    (tmp_path / "in.bin").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="does not unpickle"):
        import_pickle.convert(tmp_path / "in.bin", tmp_path / "out", trusted=True)
    assert not (tmp_path / "out").exists()


def test_a_pickle_without_a_tokenizer_gets_that_of_the_base_model(pickled, tiny_checkpoint, tmp_path):
    model, _ = pickled
    torch.save({"model": Pruned(model), "tokenizer": None}, tmp_path / "bare.bin")
    with pytest.raises(CheckpointError, match="--base"):
        import_pickle.convert(tmp_path / "bare.bin", tmp_path / "out", trusted=True)
    import_pickle.convert(tmp_path / "bare.bin", tmp_path / "out", base=tiny_checkpoint("llama"), trusted=True)
    assert torch.equal(load(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_nothing_else_in_the_project_unpickles():
    for path in Path(coppice.__file__).parent.rglob("*.py"):
        names = {a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names}
        assert not names & {"pickle", "dill", "cloudpickle", "joblib"}, path
        assert "weights_only=False" not in path.read_text(), path


def test_runs_as_one_command_from_any_folder(tmp_path):
    command = [sys.executable, import_pickle.__file__, str(tmp_path / "none.bin"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.endswith("there is no such file. Give the path of the pickle.\n")
