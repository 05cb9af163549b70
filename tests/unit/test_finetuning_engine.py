"""The training engine: exact gradients in every arrangement of examples, scarce memory, and every option of peft."""

import copy

import pytest
import tiny_architectures
import torch
from test_finetuning import SETTINGS, adapter_of, train
from test_finetuning import dataset as dataset

from coppice import models
from coppice.core import records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import output_head, packing
from coppice.models.causal_lm import KIND
from coppice.models.text_examples import IGNORED
from coppice.stages import recover
from coppice.stages.recover.lora import Lora
from coppice.study.settings.sections.finetune import TrainingData

TYPED = recover.TrainingSettings.model_validate(SETTINGS)
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "llama-tied": {"tie_word_embeddings": True},
}


def adapted(model, dropout=0.0, targets="all-linear"):
    """Return a LoRA model whose B matrices are not zero, so that A has gradients too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0.0, 0.05)
    return model.train()


def some_examples(count=20, seed=0):
    """Return examples of many lengths, in two groups with a common prefix each; part of the labels is masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 128, (length,), generator=generator).tolist()

    stems = [draw(8, 12), draw(5, 9)]
    made = []
    for i in range(count):
        prompt, answer = stems[i % 2] + draw(1, 6), draw(1, 20)
        labels = [IGNORED] * len(prompt) + answer if i % 5 else prompt + answer
        made.append({"input_ids": prompt + answer, "labels": labels, "row": i})
    return made


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def number_of_targets(examples):
    """Labels that a causal model predicts: those after the first, masked ones left out."""
    return sum(int((torch.tensor(example["labels"])[1:] != IGNORED).sum()) for example in examples)


def padded_gradients(model, examples, micro=4):
    """Return the gradients of padded batches: `micro` examples at a time, with full logits.

    The loss is normalized by the number of targets in the step.
    """
    total = number_of_targets(examples)
    for start in range(0, len(examples), micro):
        part = examples[start : start + micro]
        length = max(len(example["input_ids"]) for example in part)
        rows = {"input_ids": 0, "labels": IGNORED}
        batch = {k: torch.tensor([e[k] + [pad] * (length - len(e[k])) for e in part]) for k, pad in rows.items()}
        mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in part])
        model(**batch, attention_mask=mask, num_items_in_batch=total).loss.backward()
    return gradients(model)


def engine_gradients(model, examples, **options):
    engine = packing.Engine(model, **{"token_limit": 100, **options})
    total, losses = packing.count_targets(examples), []
    for micro in engine.micro_batches(examples):
        loss = engine.summed_loss(micro) / total
        loss.backward()
        losses.append(loss.item())
    return gradients(model), sum(losses)


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.norm()) or 1.0
        assert float((found[name] - gradient).norm()) <= tolerance * scale, name


@pytest.mark.parametrize("how", ["tree", "sorted"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_those_of_padded_batches(tiny_model, architecture, how):
    model = adapted(tiny_model(architecture.split("-")[0], **ARCHITECTURES[architecture]))
    examples = some_examples()
    expected = padded_gradients(model, examples)
    for limit in (30, 100, 4000):
        found, _ = engine_gradients(model, examples, token_limit=limit, arrangement=how)
        assert_close(found, expected)


def test_eager_attention_gives_the_same_gradients(tiny_model):
    plain, eager = tiny_model("llama"), tiny_model("llama")
    eager.set_attn_implementation("eager")
    expected = padded_gradients(adapted(plain), some_examples())
    found, _ = engine_gradients(adapted(eager), some_examples(), arrangement="tree")
    assert_close(found, expected)


def test_the_gradient_of_one_example_with_dropout_equals_autograd(tiny_model):
    """A micro-batch of one example draws the same masks either way."""
    model, [example] = adapted(tiny_model("llama"), dropout=0.3), some_examples(1)
    short = {key: value[:-1] if key != "row" else value for key, value in example.items()}
    torch.manual_seed(5)
    found, _ = engine_gradients(model, [example], arrangement="sorted")
    torch.manual_seed(5)
    hidden = model.get_base_model().model(torch.tensor([short["input_ids"]])).last_hidden_state
    labels = torch.tensor(example["labels"][1:])
    logits = model.get_base_model().lm_head(hidden)[0]
    torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED).backward()
    assert_close(found, gradients(model))


def test_trains_an_adapter_on_the_output_layer(tiny_model):
    targets = ["q_proj", "lm_head"]
    model = adapted(tiny_model("llama"), targets=targets)
    expected = padded_gradients(model, some_examples())
    assert any("lm_head" in name for name in expected)
    found, _ = engine_gradients(model, some_examples(), arrangement="tree")
    assert_close(found, expected)


def test_gradients_are_exact_in_layers_of_different_widths(tiny_model):
    model = tiny_model("llama")
    for layer, width in zip(model.model.layers, (48, 20, 33, 7), strict=True):
        layer.mlp.gate_proj, layer.mlp.up_proj = (torch.nn.Linear(32, width, bias=False) for _ in range(2))
        layer.mlp.down_proj = torch.nn.Linear(width, 32, bias=False)
    model = adapted(model)
    expected = padded_gradients(model, some_examples())
    assert_close(engine_gradients(model, some_examples(), arrangement="tree")[0], expected)


def test_the_tree_computes_shared_prefixes_once(tiny_model):
    stem = list(range(3, 63))
    examples = [{"input_ids": [*stem, 70 + i, 90 + i], "labels": [IGNORED] * 61 + [90 + i], "row": i} for i in range(8)]
    model = adapted(tiny_model("llama"))
    run = {
        how: sum(micro.tokens for micro in packing.Engine(model, 4000, how).micro_batches(examples))
        for how in ("tree", "sorted")
    }
    assert run == {"tree": 60 + 8, "sorted": 8 * 61}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_summed_loss_and_its_gradient_equal_cross_entropy(monkeypatch, bias, trained):
    monkeypatch.setattr(output_head, "TRAINING_CHUNK_BYTES", 4 * 300 * 7)  # seven rows a chunk
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 300, bias=bias).requires_grad_(trained), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(300, (40,))
    loss = output_head.summed_loss(head, hidden, targets)
    (loss / 40).backward()
    found, hidden.grad = [hidden.grad, head.weight.grad], None
    head.weight.grad = None
    expected = torch.nn.functional.cross_entropy(head(hidden).double(), targets)
    expected.backward()
    torch.testing.assert_close(loss.double() / 40, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0], hidden.grad, rtol=1e-5, atol=1e-6)
    if trained:
        torch.testing.assert_close(found[1], head.weight.grad, rtol=1e-5, atol=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_changes_no_result(
    tiny_checkpoint, dataset, tmp_path, monkeypatch, caplog
):
    folder = tiny_checkpoint("llama")
    whole = train(folder, dataset, tmp_path / "whole")
    real = packing.Engine.summed_loss

    def scarce(self, micro):
        if micro.tokens > 12 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory")
        return real(self, micro)

    monkeypatch.setattr(packing.Engine, "summed_loss", scarce)
    record = train(folder, dataset, tmp_path / "scarce")
    assert record["tokens_at_a_time"] < 128 and "out of memory at step 1" in caplog.text
    assert record["steps"] == whole["steps"] and record["tokens_seen"] == whole["tokens_seen"]
    assert record["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-4)


# several options at once if they are independent
OPTIONS = {
    "light, cosine": {
        "lora": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "schedule": "cosine",
    },
    "standard, sorted": {
        "lora": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "attention"},
        "arrangement": "sorted",
    },
    "full, constant, weight decay": {
        "lora": {"r": 32, "alpha": 64, "dropout": 0.05, "target_modules": ["attention", "mlp"]},
        "schedule": "constant_with_warmup",
        "weight_decay": 0.1,
    },
    "aggressive, gradient checkpointing": {
        "lora": {"r": 64, "alpha": 128, "dropout": 0.05, "target_modules": ["attention", "mlp"]},
        "gradient_checkpointing": True,
    },
    "dotted name, on inputs": {"lora": {"target_modules": ["mlp.down_proj"]}, "data": {"train_on_inputs": True}},
    "all biases, a share for validation": {"lora": {"bias": "all"}, "data": {"val_size": 0.25}},
    "LoRA's biases, no validation": {"lora": {"bias": "lora_only"}, "data": {"val_size": 0}},
    "rsLoRA": {"lora": {"use_rslora": True}},
    "DoRA": {"lora": {"use_dora": True}},
    "gaussian": {"lora": {"init": "gaussian"}},
    "PiSSA": {"lora": {"init": "pissa"}},
    "fast PiSSA": {"lora": {"init": "pissa_niter_4"}},
    "OLoRA": {"lora": {"init": "olora"}},
    "EVA": {"lora": {"init": "eva"}},
    "orthogonal": {"lora": {"init": "orthogonal"}},
}


def with_options(options):
    settings = copy.deepcopy(SETTINGS)
    for key, value in options.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    return settings


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_its_adapter_loads_with_plain_peft(tiny_checkpoint, dataset, tmp_path, name):
    """Plain peft on the unchanged base gives the validation loss of the training."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, output = tiny_checkpoint("qwen2"), tmp_path / "out"
    record = train(folder, dataset, output, with_options(OPTIONS[name]))
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = base(torch.tensor([[5, 6, 9, 10]])).logits
    loaded = PeftModel.from_pretrained(base, output).eval()
    trained = loaded(torch.tensor([[5, 6, 9, 10]])).logits
    assert not torch.allclose(plain, trained, atol=1e-4)
    if record["validation_loss"] is not None:
        assert record["validation_loss"] < record["first_validation_loss"]
        assert validation_loss(loaded, dataset, output) == pytest.approx(record["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_trains_an_adapter_on_a_quantized_base(tiny_checkpoint, dataset, tmp_path, bits):
    source = models.Source(str(tiny_checkpoint("llama")), quantize=bits)
    recover.finetune(
        recover.TrainingRequest(
            {"model": "M", "config": "c"}, source, {"mine": dataset}, TYPED, "none", tmp_path, seed=3
        )
    )
    record = records.read(tmp_path / "finetuning_config.json")
    assert record["validation_loss"] < record["first_validation_loss"]
    assert models.load(source, tmp_path)(torch.tensor([[5, 6, 9]])).logits.isfinite().all()


def test_a_4_bit_base_passes_the_same_gradients_after_an_evaluation_as_before(tiny_checkpoint):
    """In an evaluation, bitsandbytes packs layers if the CPU has AVX512-BF16, and packed layers pass no gradients."""
    folder = tiny_checkpoint("llama", hidden_size=64, intermediate_size=128)
    model = models.load(models.Source(str(folder), quantize="4bit"))
    embeddings = model.get_input_embeddings()(torch.tensor([[5, 6, 9, 10]])).detach().requires_grad_()

    def gradient():
        (found,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.sum(), embeddings)
        return found

    before = gradient()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 9, 10]]))
    assert before.abs().max() > 0 and torch.equal(gradient(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which LoftQ works")
def test_rejects_loftq_without_a_gpu(tiny_checkpoint, dataset, tmp_path):
    with pytest.raises(SettingsError, match=r"finetune\.lora"):
        train(tiny_checkpoint("llama"), dataset, tmp_path, with_options({"lora": {"init": "loftq"}}))


def validation_loss(model, dataset, output):
    """Return the validation loss of `model` by transformers' own loss, over the rows that were held out."""
    from coppice.stages.recover import examples

    settings = records.read(output / "finetuning_config.json")["settings"]
    rows = TrainingData.model_validate(settings["data"])
    reader = models.Reader(models.load_tokenizer(output))
    _, held, _ = examples.prepare({"mine": dataset}, rows, settings["prompt"], reader, 3, KIND)
    total = number_of_targets(held)
    with torch.no_grad():
        return sum(
            model(
                input_ids=torch.tensor([e["input_ids"]]), labels=torch.tensor([e["labels"]]), num_items_in_batch=total
            ).loss.item()
            for e in held
        )


def test_merging_adds_the_scaled_ba_to_w_exactly_once(tiny_checkpoint, dataset, tmp_path):
    from safetensors.torch import load_file

    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, SETTINGS | {"merge": True})
    adapter, base, merged = (
        adapter_of(output),
        load_file(folder / "model.safetensors"),
        load_file(output / "merged/model.safetensors"),
    )
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 8 / 4 * b @ a)
    model = models.load(models.Source(str(folder)), output).merge_and_unload()
    again = {key: value.clone() for key, value in model.state_dict().items()}
    assert not hasattr(model, "merge_and_unload")
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_names_the_key_of_what_peft_rejects(tiny_model):
    adapter = SETTINGS["lora"] | {"use_dora": True, "init": "loftq", "target_modules": ["nothing"]}
    settings = recover.TrainingSettings.model_validate(SETTINGS | {"lora": adapter})
    with pytest.raises(SettingsError, match=r"finetune\.lora\.target_modules.*q_proj"):
        Lora().prepare(tiny_model("llama"), KIND, models.Source(""), settings, some_examples())


def test_rejects_the_tree_arrangement_with_the_reason():
    model = tiny_architectures.build("gpt_neo")
    with pytest.raises(CoppiceError, match=r"finetune\.arrangement.*local attention.*Set it to sorted"):
        packing.Engine(model, 100, "tree")
