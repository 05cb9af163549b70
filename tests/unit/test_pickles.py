"""Files of pickled Python objects are recognized from their opcodes, and the message says how to convert them."""

import collections
import pickle
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from coppice import models
from coppice.core.errors import CheckpointError, CoppiceError
from coppice.models import files, pickles
from coppice.study.settings import candidate_lists

CONVERTS = r"python contrib/import_pickle/import_pickle\.py .* OUT --i-trust-this-file"


class Model(torch.nn.Linear):
    """A model of a class that torch does not know."""

    def __init__(self):
        super().__init__(4, 4)


def save(content, path, how):
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif how == "protocol 4":
        torch.save(content, path, pickle_protocol=4)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")


HOW = ["zip", "legacy", "pickle", "protocol 4"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "content", [Model, lambda: {"model": Model(), "tokenizer": None}], ids=["module", "LLM-Pruner"]
)
def test_recognizes_a_pickled_model_without_loading_it(tmp_path, content, how, monkeypatch):
    save(content(), tmp_path / "x.bin", how)
    monkeypatch.setattr(Model, "__setstate__", lambda *_: pytest.fail("was loaded"), raising=False)
    found = pickles.read(tmp_path / "x.bin")
    assert any(name.endswith(".Model") for name in found.objects) and not found.program


PLAIN = {
    "a state dict": lambda: Model().state_dict(),
    "parameters": lambda: collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))),
    "a training checkpoint": lambda: {"state_dict": Model().state_dict(), "epoch": 3, "shape": torch.Size([2])},
    "integers": lambda: {"ids": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool)},
}


@pytest.mark.parametrize("how", ["zip", "legacy"])  # torch itself loads no other protocol
@pytest.mark.parametrize("content", PLAIN.values(), ids=PLAIN)
def test_accepts_what_torch_loads_as_plain_tensors(tmp_path, content, how):
    save(content(), tmp_path / "x.bin", how)
    torch.load(tmp_path / "x.bin", weights_only=True)
    assert pickles.read(tmp_path / "x.bin").objects == ()


def test_leaves_damaged_files_to_whoever_reads_their_tensors(tmp_path):
    torch.save(Model().state_dict(), tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2], b"\x80\x02", b"PK\x03\x04"):
        (tmp_path / "x.bin").write_bytes(content)
        found = pickles.read(tmp_path / "x.bin")
        assert found is None or not found.objects


LAYOUTS = {
    "pytorch_model.bin": "zip",
    "pytorch_model-00001-of-00002.bin": "legacy",
    "latest_model.bin": "zip",
    "model.pt": "zip",
    "pruned.pth": "legacy",
    "checkpoint.pt": "pickle",
    "model.ckpt": "protocol 4",
    "model.pkl": "pickle",
}


@pytest.mark.parametrize(("name", "how"), LAYOUTS.items(), ids=LAYOUTS)
def test_names_the_converter_for_a_pickled_model_beside_a_configuration(tiny_checkpoint, name, how):
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    save({"model": Model(), "tokenizer": None}, folder / name, how)
    for read in (files.check, lambda path: models.load(models.Source(str(path)))):
        with pytest.raises(CheckpointError, match=f"{name}: is a pickle of Python objects .*{CONVERTS}") as raised:
            read(folder)
        assert "weights_only" not in str(raised.value)


def test_a_table_names_the_converter_for_a_folder_with_nothing_but_a_pickle(tmp_path):
    (tmp_path / "pruned").mkdir()
    save({"model": Model(), "tokenizer": None}, tmp_path / "pruned/pytorch_model.bin", "zip")
    (tmp_path / "t.tsv").write_text("model\tcandidate\tpath\nLlama\tx\tpruned\n")
    with pytest.raises(
        CoppiceError, match=f"row 2, column path: pruned .*holds the pickle pytorch_model.bin.*{CONVERTS}"
    ):
        candidate_lists.table("t.tsv", tmp_path, ())


def test_the_command_that_converts_works_for_a_path_with_spaces():
    command = pickles.conversion("my models/it's one.bin")
    assert shlex.split(command)[2:] == ["my models/it's one.bin", "OUT", "--i-trust-this-file"]


def test_a_table_names_the_folder_of_a_file_of_tensors(tmp_path):
    torch.save(Model().state_dict(), tmp_path / "model.pt")
    (tmp_path / "t.tsv").write_text("model\tcandidate\tpath\nLlama\tx\tmodel.pt\n")
    with pytest.raises(CoppiceError, match=r"model\.pt is a file of tensors; name the folder"):
        candidate_lists.table("t.tsv", tmp_path, ())


def test_refuses_a_script_module_in_other_words(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    content = pickles.read(tmp_path / "model.pt")
    assert content.program and "TorchScript" in pickles.refusal(tmp_path / "model.pt", content)


def test_tensors_under_a_name_that_nothing_reads_are_refused_with_a_way_out(tiny_checkpoint):
    folder = tiny_checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pt")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither safetensors .* but model\.pt.*save_pretrained"):
        files.check(folder)


def test_what_a_trainer_pickles_beside_the_weights_is_no_weight(tiny_checkpoint):
    folder = tiny_checkpoint()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.save(Model(), folder / "training_args.bin")
    files.check(folder)
    assert models.count_parameters(folder) > 0
    models.load(models.Source(str(folder)))


def test_no_message_passes_on_advice_to_load_an_unsafe_file(tiny_checkpoint, tmp_path):
    """An adapter is read by peft, whose error quotes torch's."""
    from peft import LoraConfig, get_peft_model

    folder = tiny_checkpoint()
    get_peft_model(models.load(models.Source(str(folder))), LoraConfig(target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save(Model(), tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(CheckpointError) as raised:
        models.load(models.Source(str(folder)), tmp_path / "adapter")
    assert "weights_only" not in str(raised.value) and "can run any code" in str(raised.value)
    shutil.copy(tmp_path / "adapter/adapter_model.bin", folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as raised:
        models.count_parameters(_without_safetensors(folder))
    assert "weights_only" not in str(raised.value)


def _without_safetensors(folder):
    (folder / "model.safetensors").unlink()
    return folder
