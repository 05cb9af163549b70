"""Fine-tuning: the examples it learns from, what it writes, what a second call does, and what it rejects."""

import copy
import datetime
import json

import jinja2
import pytest
import torch

from coppice import data, models
from coppice.core import records
from coppice.core.errors import CoppiceError, DataError, SettingsError
from coppice.data import prompts
from coppice.models.causal_lm import KIND
from coppice.models.text_examples import IGNORED
from coppice.stages import recover
from coppice.stages.recover import examples, target_names
from coppice.stages.recover.engine import progress
from coppice.stages.recover.engine.best_by import BestBy
from coppice.study.settings.sections.finetune import TrainingData

SETTINGS = {
    "data": {"dataset": "mine", "val_size": 8, "validation": None, "cutoff_len": 32, "train_on_inputs": False},
    "lora": {
        "preset": None,
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init": "default",
    },
    "epochs": 1,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "schedule": "linear",
    "weight_decay": 0.0,
    "batch_size": 8,
    "micro_batch_size": 4,
    "arrangement": None,
    "gradient_checkpointing": None,
    "sharding": None,
    "early_stopping": None,
    "warmup_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "report_to": [],
    "merge": False,
    "seeds": None,
}


def instruction_rows(count=64):
    return [{"instruction": f"w{5 + i % 50} w6", "input": "", "output": f"w{5 + i % 50} w9 w10"} for i in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.write("mine", {"train": instruction_rows()}, folder)
    return folder / "dataset.json"


def train(folder, dataset, output, settings=SETTINGS, prompt="none", world=1, chat_date=None):
    identity, source = {"model": "M", "config": "c"}, models.Source(str(folder), chat_date=chat_date)
    how = recover.TrainingSettings.model_validate(settings)
    recover.finetune(
        recover.TrainingRequest(identity, source, {"mine": dataset}, how, prompt, output, seed=3, world=world)
    )
    return records.read(output / "finetuning_config.json")


def adapter_of(output):
    from safetensors.torch import load_file

    return load_file(output / "adapter_model.safetensors")


def test_writes_adapter_tokenizer_and_records_while_the_loss_falls(tiny_checkpoint, dataset, tmp_path):
    output = tmp_path / "out"
    record = train(tiny_checkpoint("llama"), dataset, output)
    assert record["steps"] == 6 and record["train_rows"] == 56 and record["validation_rows"] == 8
    assert record["validation_loss"] < record["first_validation_loss"]
    assert record["trainable_parameters"] == sum(t.numel() for t in adapter_of(output).values())
    history = records.read(output / "training_state.json")["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4, 6]
    assert "validation" in (output / "training_log.txt").read_text()
    assert {"tokenizer.json", "adapter_config.json"} <= {path.name for path in output.iterdir()}


def test_restores_the_same_adapter_from_the_last_checkpoint(tiny_checkpoint, dataset, tmp_path):
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output)
    first = adapter_of(output)
    (output / "adapter_model.safetensors").unlink()  # as Snakemake does before a rerun
    train(folder, dataset, output)
    assert all(torch.equal(first[name], tensor) for name, tensor in adapter_of(output).items())


def test_does_not_resume_from_checkpoints_of_other_settings_and_removes_them(tiny_checkpoint, dataset, tmp_path):
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    train(folder, dataset, output, SETTINGS | {"max_steps": 4})
    train(folder, dataset, output, SETTINGS | {"learning_rate": 1e-3})
    assert not list(output.glob("superseded-*")) and len(list(output.glob("checkpoint-*"))) == 1
    train(folder, dataset, tmp_path / "fresh", SETTINGS | {"learning_rate": 1e-3})
    fresh = adapter_of(tmp_path / "fresh")
    assert all(torch.equal(fresh[name], tensor) for name, tensor in adapter_of(output).items())


def test_the_merged_checkpoint_gives_the_adapters_logits(tiny_checkpoint, dataset, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, output = tiny_checkpoint("mistral"), tmp_path / "out"
    train(folder, dataset, output, SETTINGS | {"merge": True})
    ids = torch.tensor([[5, 6, 9]])
    merged = AutoModelForCausalLM.from_pretrained(output / "merged").eval()(ids).logits
    assert torch.allclose(merged, models.load(models.Source(str(folder)), output)(ids).logits, atol=1e-4)


def test_a_loss_that_is_not_a_number_fails_with_advice(tiny_checkpoint, dataset, tmp_path):
    too_fast = recover.TrainingSettings.model_validate(SETTINGS | {"warmup_steps": 0})
    too_fast = too_fast.model_copy(update={"learning_rate": 1e30})  # more than the configuration allows
    with pytest.raises(CoppiceError, match=r"step .*learning_rate"):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", too_fast)
    assert not (tmp_path / "out/finetuning_config.json").exists()


def prepared(rows, tokenizer, tmp_path, prompt="none", **options):
    """Return (training examples of `rows`, facts about them); no row is held out."""
    data.write("mine", {"train": rows}, tmp_path / "rows")
    settings = TrainingData.model_validate(SETTINGS["data"] | {"val_size": 0} | options)
    reader, record = models.Reader(tokenizer), tmp_path / "rows/dataset.json"
    train, _, facts = examples.prepare({"mine": record}, settings, prompt, reader, 3, KIND)
    return train, facts


def learned_tokens(example):
    return [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]


def test_the_loss_counts_only_the_response_and_its_end(tiny_tokenizer, tmp_path):
    [example], facts = prepared(instruction_rows(1), tiny_tokenizer, tmp_path)
    ids = tiny_tokenizer("w5 w6")["input_ids"]
    assert example["input_ids"] == [*ids, 5, 9, 10, 2] and facts["skipped_rows"] == 0
    assert example["labels"] == [IGNORED] * len(ids) + [5, 9, 10, 2]
    assert example["row"] == 0


def test_leaves_out_and_counts_rows_with_a_truncated_or_empty_response(tiny_tokenizer, tmp_path):
    empty = {"instruction": "w5", "input": "", "output": " "}
    rows = [{"instruction": "w5 " * 40, "input": "", "output": "w6"}, empty, *instruction_rows(1)]
    kept, facts = prepared(rows, tiny_tokenizer, tmp_path)
    assert len(kept) == 1 and facts["skipped_rows"] == 2


def test_learns_every_answer_of_a_chat_with_the_templates_end_of_turn(tiny_tokenizer, tmp_path):
    """The fixture's template puts w4 before and w5 after each turn."""
    turns = [("user", "w10"), ("assistant", "w11"), ("user", "w12"), ("assistant", "w13 w14")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    [example], _ = prepared(rows, tiny_tokenizer, tmp_path, prompt="chat")
    assert example["input_ids"] == [4, 10, 5, 4, 11, 5, 4, 12, 5, 4, 13, 14, 5]
    assert learned_tokens(example) == [4, 11, 5, 4, 13, 14, 5]


def test_learns_the_templates_end_of_turn_after_an_instruction(tiny_tokenizer, tmp_path):
    [example], _ = prepared([{"instruction": "w7", "output": "w8"}], tiny_tokenizer, tmp_path, prompt="chat")
    assert example["input_ids"] == [4, 7, 5, 4, 8, 5] and learned_tokens(example) == [4, 8, 5]


def test_tokenizes_the_answer_together_with_its_prompt(tmp_path):
    """A SentencePiece-like tokenizer puts a marker at a text's start: tokenized alone, answers would begin with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.Unigram())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.train_from_iterator(["ask this\nsay that"] * 9, trainers.UnigramTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="\u2581", pad_token="\u2581")
    [example], _ = prepared([{"instruction": "ask this", "output": "say that"}], tokenizer, tmp_path)
    assert example["input_ids"][:-1] == tokenizer("ask this\nsay that", add_special_tokens=False)["input_ids"]
    text = "".join(tokenizer.convert_ids_to_tokens(learned_tokens(example)[:-1]))
    assert text.replace("\u2581", " ").strip() == "say that"


def test_a_chat_template_reads_the_fixed_day_and_not_the_clock(tiny_checkpoint, tmp_path):
    """The template of the reference is rendered by Jinja itself."""
    folder = tiny_checkpoint()
    template = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    fixed = models.Source(str(folder), chat_date="2024-07-26").tokenizer()
    turns = [{"role": "user", "content": "w9"}]
    day = datetime.datetime(2024, 7, 26)
    expected = jinja2.Template(template).render(messages=turns, strftime_now=day.strftime)
    assert fixed.apply_chat_template(turns, tokenize=False) == expected
    assert models.load_tokenizer(folder).apply_chat_template(turns, tokenize=False) != expected
    assert copy.deepcopy(fixed).apply_chat_template(turns, tokenize=False) == expected


def test_two_trainings_of_one_study_read_the_same_date(tiny_checkpoint, dataset, tmp_path):
    """The template gives microseconds, so without a fixed day two trainings never see the same text."""
    folder = tiny_checkpoint()
    (folder / "chat_template.jinja").write_text(
        "{% for c in strftime_now('%f') %}w{{ c | int + 10 }} {% endfor %}"
        "{% for m in messages %}w4 {{ m['content'] }} w5 {% endfor %}"
    )
    found = {}
    for name, day in (("one", "2024-07-26"), ("two", "2024-07-26"), ("clock", None)):
        record = train(folder, dataset, tmp_path / name, prompt="chat", chat_date=day)
        found[name] = adapter_of(tmp_path / name)
        assert record.get("chat_date") == day
    assert all(torch.equal(tensor, found["two"][name]) for name, tensor in found["one"].items())
    assert not all(torch.equal(tensor, found["clock"][name]) for name, tensor in found["one"].items())


def test_names_the_row_that_the_chat_template_rejects(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    turns = [{"role": role, "content": "w5"} for role in ("system", "user", "assistant")]
    with pytest.raises(DataError, match="row 0: the chat template rejects it: no system turn"):
        prepared([{"messages": turns}], tokenizer, tmp_path, prompt="chat")


def test_names_the_key_of_a_tracker_that_is_not_installed(tiny_checkpoint, dataset, tmp_path):
    with pytest.raises(SettingsError, match=r"finetune\.report_to: dvclive"):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", SETTINGS | {"report_to": ["dvclive"]})


def test_learns_the_last_answer_if_a_template_rewrites_earlier_turns(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    [example], _ = prepared([{"instruction": "w7", "output": "w8"}], tokenizer, tmp_path, prompt="chat")
    assert learned_tokens(example) == [8, 2]


@pytest.mark.parametrize("prompt", ["alpaca", "chat", "none"])
def test_treats_a_field_without_a_value_as_empty(tiny_tokenizer, tmp_path, prompt):
    """An empty cell of a CSV file has no value; it used to be learned as the word None, or to stop the training."""
    for place, row in enumerate(
        ({"instruction": "", "input": "w7", "output": "w9"}, {"prompt": "", "completion": "w9"})
    ):
        forms = [row, {name: value or None for name, value in row.items()}]
        filled = row | dict.fromkeys(list(row)[:1], "w5")  # gives the column its type
        found = [
            prepared([form, filled], tiny_tokenizer, tmp_path / f"{place}{i}", prompt)[0]
            for i, form in enumerate(forms)
        ]
        assert found[0] == found[1]


def test_takes_completions_and_plain_text_unchanged(tiny_tokenizer, tmp_path):
    [example], _ = prepared([{"prompt": "w7 w8", "completion": " w9"}], tiny_tokenizer, tmp_path / "a", prompt="alpaca")
    assert example["input_ids"] == [7, 8, 9, 2] and learned_tokens(example) == [9, 2]
    text = " ".join(f"w{10 + i}" for i in range(11))
    parts, _ = prepared([{"text": text}], tiny_tokenizer, tmp_path / "b", cutoff_len=8)
    assert [part["input_ids"] for part in parts] == [list(range(10, 18)), [18, 19, 20, 2]]


def test_a_mixture_has_the_configured_shares_and_repeats_no_row(tiny_tokenizer, tmp_path):
    text = [{"text": f"w{5 + i} w9"} for i in range(100)]
    data.write("a", {"train": instruction_rows(30)}, tmp_path / "a")
    data.write("b", {"train": text}, tmp_path / "b")
    records_of = {name: tmp_path / name / "dataset.json" for name in "ab"}
    settings = TrainingData.model_validate(SETTINGS["data"] | {"dataset": {"a": 3, "b": 1}, "val_size": 0.25})
    train, held, facts = examples.prepare(records_of, settings, "none", models.Reader(tiny_tokenizer), 3, KIND)
    assert facts["mixture"] == {"a": 30, "b": 10} and len(held) == 10
    assert len({example["row"] for example in train + held}) == 40
    settings = TrainingData.model_validate(SETTINGS["data"] | {"dataset": "a", "validation": "b"})
    train, held, _ = examples.prepare(records_of, settings, "none", models.Reader(tiny_tokenizer), 3, KIND)
    assert len(train) == 30 and {example["row"].split(":")[0] for example in held} == {"b"}


def test_rejects_chat_prompts_without_a_chat_template(tiny_tokenizer):
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    with pytest.raises(SettingsError, match="chat template"):
        prompts.Formatter("instruction", "chat", plain)


def test_names_a_missing_column(tiny_checkpoint, tmp_path):
    data.write("mine", {"train": [{"question": "w5", "output": "w6"}]}, tmp_path / "data")
    with pytest.raises(DataError, match="instruction"):
        train(tiny_checkpoint("llama"), tmp_path / "data/dataset.json", tmp_path / "out")


def test_rejects_more_validation_rows_than_rows(tiny_checkpoint, dataset, tmp_path):
    settings = SETTINGS | {"data": SETTINGS["data"] | {"val_size": 64}}
    with pytest.raises(SettingsError, match=r"val_size.*64"):
        train(tiny_checkpoint("llama"), dataset, tmp_path / "out", settings)


def test_lists_the_models_layers_if_a_module_name_matches_none(tiny_model):
    with pytest.raises(SettingsError, match=r"q_porj.*down_proj.*q_proj"):
        target_names.target_modules(tiny_model("llama"), KIND, ["q_porj"])


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["attention", "mlp"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["mlp.up_proj"], {"mlp.up_proj"}),
    ],
)
def test_accepts_groups_and_dotted_names_of_modules(tiny_model, wanted, found):
    assert set(target_names.target_modules(tiny_model("qwen2"), KIND, wanted)) == found


def test_the_log_shows_progress_and_speed(tiny_checkpoint, dataset, tmp_path):
    train(tiny_checkpoint("llama"), dataset, tmp_path / "out", SETTINGS | {"eval_steps": 3, "save_steps": 3})
    head, *lines = (tmp_path / "out/training_log.txt").read_text().splitlines()
    assert "tokens/s" in head and "time left" in head
    assert lines[-1].split()[0] == "6/6"
    assert json.loads((tmp_path / "out/.training_key.json").read_text())["key"]


@pytest.mark.parametrize(("best", "step", "warned"), [(1.9, 10, True), (1.8, 40, False), (1.9, 60, False)])
def test_warns_of_a_validation_loss_that_never_falls(best, step, warned):
    """No warning if the only loss is that of the last step, since there is nothing to compare it with."""
    history = [{"eval_loss": 1.9, "step": 5}, {"eval_loss": best, "step": step}][: 1 if step == 60 else 2]
    found = progress.warnings_of(BestBy().found(history), 60 if step != 60 else 5, BestBy())
    assert bool(found) == warned and (not found or "never fell below its first value" in found[0])


@pytest.mark.parametrize(
    ("warmup", "schedule", "warned"), [(1, "linear", []), (100, "constant", []), (100, "linear", ["never reached"])]
)
def test_warns_of_a_training_that_ends_during_warmup(tiny_checkpoint, dataset, tmp_path, warmup, schedule, warned):
    """As with the usual 100 warm-up steps on a thousand rows."""
    settings = SETTINGS | {"warmup_steps": warmup, "schedule": schedule}
    train(tiny_checkpoint("llama"), dataset, tmp_path / "out", settings)
    warnings = records.read(tmp_path / "out/finetuning_config.json")["warnings"]
    assert ["never reached" for words in warnings if "never reached finetune.learning_rate" in words] == warned


def test_warns_of_a_training_without_validation_rows(tiny_checkpoint, dataset, tmp_path):
    settings = SETTINGS | {"data": SETTINGS["data"] | {"val_size": 0}}
    record = train(tiny_checkpoint("llama"), dataset, tmp_path / "out", settings)
    assert record["validation_loss"] is None and "no validation loss" in record["warnings"][0]


def test_an_adapters_configuration_has_the_same_bytes_in_every_process(tiny_checkpoint, dataset, tmp_path):
    """The targeted modules are a set in peft, whose order differs between processes."""
    train(tiny_checkpoint("llama"), dataset, tmp_path / "out")
    for path in [tmp_path / "out", *(tmp_path / "out").glob("checkpoint-*")]:
        modules = json.loads((path / "adapter_config.json").read_text())["target_modules"]
        assert len(modules) == 7 and modules == sorted(modules)
