"""What a study will need, estimated from configurations alone and compared with models that were really built."""

import json
import random
import re
import shutil
import string
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from coppice import cli
from coppice.miniature import pretraining, tiny_models
from coppice.models import estimates
from coppice.planning import job_resources, plan
from coppice.stages.recover.lora import Lora
from coppice.stages.recover.training_request import TrainingSettings
from coppice.study import settings
from coppice.study.settings.sections.finetune import Lora as Adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral"])
def built(request, tiny_model, tmp_path):
    """Return (model, path of its config.json)."""
    model = tiny_model(request.param, tie_word_embeddings=request.param == "qwen2")
    model.config.save_pretrained(tmp_path)
    return model, tmp_path / "config.json"


def test_counts_the_parameters_of_a_model(built):
    model, path = built
    assert estimates.shape_of(path).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("wanted", ["all-linear", ["attention"], ["q_proj", "mlp"]])
def test_counts_the_parameters_that_peft_adds(built, wanted):
    model, path = built
    found = estimates.adapter_parameters(estimates.shape_of(path), Adapter(r=3, target_modules=wanted))
    names = {"all-linear": ALL, "attention": ALL[:4], "mlp": ALL[4:]}
    expected = [part for name in ([wanted] if isinstance(wanted, str) else wanted) for part in names.get(name, [name])]
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=expected, task_type="CAUSAL_LM"))
    assert found == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("wanted", [ALL, ALL[:4]])
def test_estimates_what_a_layer_keeps_for_its_backward_pass(tiny_model, tmp_path, wanted, dropout):
    """Counts each tensor that autograd keeps while a model with an adapter runs."""
    import torch

    model = tiny_model("llama", hidden_size=128, intermediate_size=352, head_dim=16, num_key_value_heads=8)
    model.config.save_pretrained(tmp_path)
    tuned = TrainingSettings(lora=Adapter(r=2, target_modules=wanted, dropout=dropout))
    options = {"target_modules": wanted, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(r=2, **options)).train()
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 200
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model.model.model(input_ids=torch.randint(3, 128, (1, tokens)), use_cache=False)
    shape = estimates.shape_of(tmp_path / "config.json")
    counted = sum(size for place, size in kept.items() if place not in held) / tokens / shape.layers
    adapted = Lora().memory(shape, tuned).kept_bytes
    assert estimates.layer_bytes(shape, 4) + adapted == pytest.approx(counted, rel=0.2)


def test_a_missing_or_invalid_configuration_has_no_shape(tmp_path):
    assert estimates.shape_of(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text("{")
    assert estimates.shape_of(tmp_path / "bad.json") is None


def test_plans_the_jobs_hours_and_disk_of_the_real_study(capsys, monkeypatch):
    assert cli.main(["plan", "--configfile", "config/full.yaml"]) == 0
    output = capsys.readouterr().out
    assert "finetune " in output and "GPU hours" in output
    # 2 x (8.03 + 7.62 + 7.25) * 10^9 parameters of two bytes are 92 GB, and a little more because shapes are guessed
    assert 92 <= int(re.search(r"dense models (\d+) GB", output)[1]) <= 96


def test_plan_accepts_the_config_arguments_of_snakemake(capsys):
    words = ["--config", "only={models: [Qwen]}", "finetune={seeds: [1, 2, 3]}"]
    assert cli.main(["plan", "--configfile", "config/full.yaml", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    jobs = {row[0]: row[1] for row in rows if len(row) > 2}
    assert jobs["finetune"] == jobs["finetuned"] == "6" and jobs["dense"] == "1"
    assert cli.main(["plan", "--config", "finetune={epoch: 3}"]) == 1
    assert "finetune.epochs" in capsys.readouterr().err


def test_plan_shows_what_its_jobs_request():
    study = settings.load(yaml.safe_load(Path("config/full.yaml").read_text()))
    found = {stage.name: stage for stage in plan.plan(study, 150).stages}
    requested = [job_resources.Sizes(study).requested("finetune", model) for model in study.models]
    for key in ("mem_mb", "gpu_mem_mb", "disk_mb", "runtime"):
        assert getattr(found["finetune"], key) == max(one[key] for one in requested)
    without = {stage.name: stage for stage in plan.plan(study, 150, on_gpu=False).stages}
    assert without["finetune"].gpu_mem_mb == 0 and without["finetune"].hours > 100 * found["finetune"].hours


def test_plans_the_loads_of_the_jobs_that_time_models_in_turns():
    """Seven rounds load the dense model and two chosen ones: 21 loads, of which the first is in a job's start."""
    text = yaml.safe_load(Path("config/full.yaml").read_text()) | {"only": {"models": ["Llama"]}}
    study = settings.load(text)
    found = {stage.name: stage for stage in plan.plan(study, 150).stages}
    loading = 20 * 2 * job_resources.Sizes(study).shape("Llama").parameters / 1e9
    assert found["latency"].jobs == 1 and found["latency"].longest == pytest.approx((60 + loading) / 60, rel=0.05)
    assert found["latency"].runtime >= 2 * loading / 60
    own = text["models"]["Llama"] | {"evaluate": {"perplexity": {"datasets": ["ptb"]}}}  # best_ppl is by wikitext2
    fewer = job_resources.Sizes(settings.load(text | {"models": text["models"] | {"Llama": own}}))
    ratio = fewer.need("latency", "Llama", True).read / job_resources.Sizes(study).need("latency", "Llama", True).read
    assert ratio == pytest.approx(13 / 20)
    without = settings.load(text | {"evaluate": {"cost": {"enabled": False}}})
    assert next(stage for stage in plan.plan(without, 150).stages if stage.name == "latency").jobs == 0


def test_plans_the_miniature_study_before_its_models_are_built(tmp_path, capsys, monkeypatch):
    shutil.copytree("config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--cpu"]) == 0
    output = capsys.readouterr().out
    assert "?" not in output and "fetch" not in output and "unknown" not in output


@pytest.mark.parametrize("name", ["llama", "qwen-instruct", "mistral"])
def test_a_miniature_model_has_the_predicted_size(name, tmp_path):
    rng = random.Random(0)
    words = [" ".join("".join(rng.choices(string.ascii_lowercase, k=9)) for _ in range(300)) for _ in range(9)]
    pretraining.train_base(name.partition("-")[0], pretraining.Text(words, [], []), tmp_path, seed=0, steps=1)
    assert estimates.shape_in(tiny_models.expected(name)) == estimates.shape_of(tmp_path / "config.json")


def test_names_and_leaves_out_a_model_of_unknown_size(tmp_path, capsys, monkeypatch):
    model = {"base": "org/big", "variant": "base", "family": "llama"}
    (tmp_path / "one.json").write_text(json.dumps({"models": {"Big": model}}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--configfile", "one.json"]) == 0
    assert "not included: Big" in capsys.readouterr().out
