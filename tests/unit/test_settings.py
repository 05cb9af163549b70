"""The configuration: what a user may write, how it is resolved, and the messages for mistakes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coppice.study import settings
from coppice.study.settings import checking, keys, reference
from coppice.study.settings.sections import forms

CONFIG = Path(__file__).parents[2] / "config"
MODEL = {"models": {"Llama": {"base": "miniature/llama"}}}
ABLATIONS = {
    "mine": {"start": {"model": "Llama"}, "arms": ["light", "standard"]},
    "gone": {"start": {"model": "Nobody"}, "arms": ["light", "standard"]},
}


def merged(*layers):
    """Merge layers as Snakemake does: mappings are merged, everything else is replaced."""
    result = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = merged(old if isinstance(old, dict) else {}, value) if isinstance(value, dict) else value
    return result


def file(name):
    return yaml.safe_load((CONFIG / name).read_text(encoding="utf-8"))


def load(*layers, **options):
    return settings.load(merged(MODEL, *layers), **options)


def message(*layers, **options):
    with pytest.raises(settings.SettingsError) as raised:
        load(*layers, **options)
    return str(raised.value)


def leaves(value, path=()):
    """Yield (path, value) of everything in nested mappings that is not a mapping."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key), item


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def test_the_miniature_study_is_six_models_by_two_criteria():
    study = settings.load(file("config.yaml"), [CONFIG / "config.yaml"])
    assert len(study.models) == 6 and len(study.pairs()) == 12
    assert study.models["Qwen-Instruct"].prompt == "chat" and study.models["Qwen"].prompt == "none"
    assert {m.source.kind for m in study.models.values()} == {"miniature"}
    assert {d.source.kind for d in study.datasets.values()} == {"miniature"}
    assert list(study.candidates("Llama")) == [
        "width-0.5-taylor",
        "width-0.5-magnitude",
        "width-0.5-activation",
        "width-0.7-taylor-mlp",
    ]
    assert not study.notices


def test_full_yaml_over_config_yaml_leaves_nothing_miniature():
    study = settings.load(merged(file("config.yaml"), file("full.yaml")), [CONFIG / "full.yaml"])
    assert len(study.pairs()) == 12
    assert {m.source.kind for m in study.models.values()} == {"hub"}
    assert {d.source.kind for d in study.datasets.values()} == {"hub"}
    assert study.dataset("boolq").splits.model_dump() == {"train": "train", "selection": None, "report": "validation"}
    assert settings.load(file("full.yaml")).config == study.config


def test_full_yaml_resets_every_key_that_config_yaml_changes():
    real, defaults = dict(leaves(file("full.yaml"))), load().config.model_dump()
    for path, value in leaves(file("config.yaml")):
        if path[0] in ("models", "datasets", "ablations"):
            assert path in real, path
            continue
        default = defaults
        for key in path:
            default = default[key]
        if value != default:
            assert path in real, path
            assert path == ("candidates", "prune") or real[path] == default, path


@pytest.fixture
def local_data(tmp_path):
    for name, entry in file("local_data.yaml")["datasets"].items():
        folder = tmp_path / "somewhere" / entry["path"].removeprefix("{data_root}/")
        folder.mkdir(parents=True)
        for split in filter(None, entry["splits"].values()):
            (folder / f"{split}{'.txt' if entry['format'] == 'text' else '.jsonl'}").write_text("")
        assert name in settings.load(file("config.yaml")).datasets
    return tmp_path / "somewhere"


@pytest.mark.parametrize("below", [["config.yaml"], ["config.yaml", "full.yaml"]])
def test_local_data_replaces_every_dataset_of_either_study(local_data, below):
    place = {"data_root": str(local_data)}
    study = settings.load(merged(*(file(name) for name in below), file("local_data.yaml"), place))
    assert {d.source.kind for d in study.datasets.values()} == {"local"}
    ptb = study.dataset("ptb")
    assert ptb.path == str(local_data / "ptb") and ptb.columns == {"text": "text"}
    assert (ptb.name, ptb.revision, ptb.format) == (None, None, "text")
    assert study.miniature.corpus == "wikitext2"


def test_names_data_root_if_its_folder_is_missing(tmp_path):
    config = merged(file("config.yaml"), file("local_data.yaml"), {"data_root": "nowhere"})
    with pytest.raises(settings.SettingsError, match="data_root: there is no folder nowhere"):
        settings.load(config, workdir=tmp_path)
    assert "data_root is not set" in message({"datasets": {"ptb": {"path": "{data_root}/ptb", "format": "text"}}})


def test_rejects_a_split_whose_file_is_missing(local_data):
    (local_data / "ptb" / "test.txt").unlink()
    with pytest.raises(settings.SettingsError, match=r"datasets\.ptb\.splits\.report: no file for 'test' .*valid\.txt"):
        settings.load(merged(file("config.yaml"), file("local_data.yaml"), {"data_root": str(local_data)}))


def test_one_file_serves_only_one_role(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    one = {"path": str(tmp_path / "rows.jsonl"), "format": "json"}
    assert load({"datasets": {"boolq": one}}).dataset("boolq").splits.model_dump() == {
        "train": None,
        "selection": None,
        "report": "validation",
    }
    error = message({"datasets": {"ptb": one}, "candidates": {"calibration": {"dataset": "ptb"}}})
    assert "datasets.ptb.path: one file cannot hold" in error and "candidates.calibration.dataset" in error


@pytest.mark.parametrize(("role", "words"), [("train", "trained on"), ("selection", "candidates are chosen by")])
def test_rejects_report_rows_for_training_or_selection(tmp_path, role, words):
    (tmp_path / "test.jsonl").write_text("{}")
    splits = {"train": None, "selection": None, "report": "test", role: "test.jsonl"}
    error = message({"datasets": {"boolq": {"path": str(tmp_path), "format": "json", "splits": splits}}})
    assert f"datasets.boolq.splits.{role} and .report" in error and words in error


WRONG = {
    "a misspelt key": ({"finetune": {"epoch": 3}}, "finetune.epoch is unknown; did you mean 'finetune.epochs'?"),
    "a key in the wrong place": ({"batch_size": 8}, "batch_size is unknown; did you mean 'finetune.batch_size'?"),
    "a misspelt key of a model": ({"models": {"A": {"bass": "x"}}}, "did you mean 'models.A.base'?"),
    "an unknown top-level key": ({"zzzz": 1}, "config key zzzz is unknown; valid are results, "),
    "words for a number": ({"finetune": {"epochs": "three"}}, "finetune.epochs: found 'three', but a number"),
    "half a step": ({"finetune": {"max_steps": 1.5}}, "finetune.max_steps: found 1.5, but an integer or null"),
    "not a number": ({"finetune": {"learning_rate": float("nan")}}, "finetune.learning_rate: found nan"),
    "a negative number": ({"finetune": {"warmup_steps": -1}}, "finetune.warmup_steps: found -1, must be at least 0"),
    "a boolean for a number": ({"seed": True}, "seed: found true, but an integer"),
    "a number for text": ({"models": {"A": {"base": "a/b", "revision": 12}}}, "revision: found 12, but text or null"),
    "a word for a list": ({"only": {"models": "Llama"}}, "only.models: found 'Llama', but a list or null is needed"),
    "a value for a section": ({"finetune": 3}, "finetune: found 3, but a mapping"),
    "null for a value": ({"finetune": {"epochs": None}}, "finetune.epochs: found null"),
    "an unknown choice": ({"candidates": {"keep": "selectd"}}, "did you mean 'selected'?"),
    "a duplicate in a list": ({"evaluate": {"zero_shot": {"tasks": ["piqa", "piqa"]}}}, "'piqa' is listed twice"),
    "a day that no month has": ({"chat_date": "2026-02-31"}, "chat_date: found '2026-02-31'; The day that"),
    "a model without a base": ({"models": {"A": {"family": "llama"}}}, "models.A.base is missing"),
    "a name with a slash": ({"models": {"a/b": {"base": "a/b"}}}, "models: the name 'a/b' cannot be part of a path"),
    "a name with dots": ({"models": {"a..b": {"base": "a/b"}}}, "models: the name 'a..b'"),
    "a config name with a line break": (
        {"select": {"configs": {"a\n": {"metric": "piqa", "mode": "max"}}}},
        "the name 'a",
    ),
    "a candidate's name": ({"candidates": {"prune": [{"method": "depth", "ratio": 0.5, "name": "../x"}]}}, "'../x'"),
    "a number for a name": ({"models": {1: {"base": "a/b"}}}, "models.1: the name 1 is not text; put it in quotes"),
    "no model": ({"models": {"Llama": None}}, "the study has no model"),
    "no config": ({"select": {"configs": {}}}, "the study has no config"),
    "no such model folder": ({"models": {"A": {"base": "./nope"}}}, "models.A.base: there is no folder ./nope"),
    "no such miniature": ({"models": {"A": {"base": "miniature/lama"}}}, "did you mean 'llama'?"),
    "a miniature of another family": ({"models": {"Llama": {"family": "qwen"}}}, "but miniature/llama is 'llama'"),
    "a bare model id": ({"models": {"A": {"base": "gpt2"}}}, "models.A.base: 'gpt2' is neither a hub id"),
    "a context of no token": (
        {"models": {"A": {"base": "a/b", "context_length": 0}}},
        "context_length: found 0, must be",
    ),
    "an unknown model in only": ({"only": {"models": ["Lama"]}}, "only.models: 'Lama' is not in the study"),
    "an unknown config in only": ({"only": {"configs": ["best_ac"]}}, "did you mean 'best_acc'?"),
    "an unknown task": ({"evaluate": {"zero_shot": {"tasks": ["pica"]}}}, "lm-eval has no task 'pica'; did you mean"),
    "a metric of no task": ({"evaluate": {"zero_shot": {"metric": {"helaswag": "acc"}}}}, "did you mean 'hellaswag'?"),
    "unknown text": ({"evaluate": {"perplexity": {"datasets": ["wikitext"]}}}, "did you mean 'wikitext2'?"),
    "unknown instructions": ({"finetune": {"data": {"dataset": "alpacca"}}}, "did you mean 'alpaca'?"),
    "unknown corpus": ({"miniature": {"corpus": "word"}}, "miniature.corpus: there is no data set 'word'"),
    "no such data": ({"datasets": {"ptb": {"path": "nope", "format": "text"}}}, "datasets.ptb.path: there is no nope"),
    "data with no report part": (
        {"datasets": {"ptb": {"splits": {"report": None}}}},
        "datasets.ptb.splits.report is null",
    ),
    "a miniature's odd split": (
        {"datasets": {"ptb": {"path": "miniature/ptb", "splits": {"train": "x"}}}},
        "found 'x'",
    ),
    "a criterion without a metric": ({"select": {"configs": {"x": {"mode": "max"}}}}, "configs.x.metric is missing"),
    "a knee with a metric": (
        {"select": {"configs": {"x": {"pareto": "knee", "metric": "piqa"}}}},
        "configs.x.metric: found piqa beside pareto",
    ),
    "a knee of one metric": (
        {"select": {"configs": {"x": {"pareto": "knee", "metrics": {"piqa": "max"}}}}},
        "configs.x.metrics: found 1",
    ),
    "a bound on an unknown metric": (
        {"select": {"configs": {"x": {"metric": "piqa", "mode": "max", "where": {"parametres": {"max": 1}}}}}},
        "configs.x: there is no metric 'parametres'",
    ),
    "a choice by the number of parameters": (
        {"select": {"configs": {"x": {"metric": "parameters", "mode": "min"}}}},
        "configs.x: 'parameters' cannot be the metric, only a bound (where: {parameters: {max:",
    ),
    "an unknown criterion": ({"select": {"configs": {"x": {"metric": "ppl.c4", "mode": "min"}}}}, "no metric 'ppl.c4'"),
    "a ratio of one": (
        {"candidates": {"prune": [{"method": "depth", "ratio": 1}]}},
        "prune[0].ratio: found 1, must be",
    ),
    "a point without ratio": ({"candidates": {"prune": [{"method": "depth"}]}}, "candidates.prune[0].ratio is missing"),
    "a width key for depth": (
        {"models": {"Llama": {"prune": [{"method": "depth", "ratio": 0.5, "parts": ["mlp"]}]}}},
        "models.Llama.prune[0].parts: is not a setting of method depth",
    ),
    "the same candidate twice": (
        {"candidates": {"prune": [{"method": "depth", "ratio": 0.5}, {"method": "depth", "ratio": "0.50"}]}},
        "candidates.prune[1]: there is already a candidate 'depth-0.5'",
    ),
    "an empty grid": ({"candidates": {"prune": []}}, "candidates.prune: is empty, so model 'Llama' has no candidate"),
    "validating on what is trained on": (
        {"finetune": {"data": {"validation": "alpaca"}}},
        "finetune.data.validation: 'alpaca' is also trained on",
    ),
    "part of a row": ({"finetune": {"data": {"val_size": 2.5}}}, "finetune.data.val_size: found 2.5"),
    "early stopping without validation": (
        {"finetune": {"early_stopping": 3, "data": {"val_size": 0}}},
        "finetune.early_stopping: needs a validation loss",
    ),
    "a mixture of nothing": ({"finetune": {"data": {"dataset": {}}}}, "finetune.data.dataset: names no data set"),
    "a mixture with an unknown name": (
        {"finetune": {"data": {"dataset": {"alpacca": 1}}}},
        "there is no data set 'alpacca'",
    ),
}


@pytest.mark.parametrize(("wrong", "expected"), WRONG.values(), ids=WRONG.keys())
def test_rejects_a_wrong_configuration_in_one_message(wrong, expected):
    error = message(wrong)
    assert expected in error and "\n" not in error


@pytest.mark.parametrize(
    ("base", "family"),
    [
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("org/Meta-Llama-3-8B", "llama"),
        ("Qwen/Qwen2.5-7B", "qwen"),
        ("google/gemma-3-1b-pt", "gemma"),
        ("EleutherAI/pythia-160m", "pythia"),
        ("openai-community/gpt2", "gpt"),
        ("me/7", "7"),
    ],
)
def test_takes_the_family_of_a_hub_model_from_its_name(base, family):
    assert load({"models": {"A": {"base": base}}}).models["A"].family == family
    assert load({"models": {"A": {"base": base, "family": "My own"}}}).models["A"].family == "My own"


@pytest.mark.parametrize(("model_type", "family"), [("qwen2", "qwen"), ("gpt_neox", "gpt_neox"), ("gemma3", "gemma3")])
def test_takes_the_family_of_a_local_model_from_its_type(checkpoint, model_type, family):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": model_type}))
    table = checkpoint.parent / "t.tsv"
    table.write_text(f"model\tcandidate\tpath\nMine\tx\t{checkpoint}\n")
    local = {"models": {"Mine": {"base": str(checkpoint)}}, "candidates": {"table": str(table)}}
    assert load(local | {"only": {"models": ["Mine"]}}).models["Mine"].family == family


def test_says_before_any_job_that_an_architecture_cannot_be_pruned(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "gpt2"}')
    local = {"models": {"Mine": {"base": str(checkpoint)}}}
    assert "models.Mine.base: Coppice cannot prune models of type 'gpt2'" in message(local)
    assert "candidates.table" in message(local)
    assert load(local | {"only": {"models": ["Llama"]}}).active_models() == ["Llama"]


def test_rejects_a_model_folder_that_is_not_a_checkpoint(tmp_path, checkpoint):
    local = {"models": {"Mine": {"base": str(checkpoint)}}}
    assert load(local).models["Mine"].source.model_dump() == {"kind": "local", "path": str(checkpoint)}
    assert load(local).models["Mine"].family == "qwen"
    assert load({"models": {"M": {"base": "./checkpoint"}}}, workdir=tmp_path).models["M"].source.kind == "local"
    (checkpoint / "config.json").unlink()
    assert "models.Mine.base" in message(local) and "no config.json" in message(local)


def test_accepts_any_task_of_lm_eval():
    study = load({"evaluate": {"zero_shot": {"tasks": ["sciq", "mmlu_anatomy"], "metric": {"sciq": "acc_norm"}}}})
    assert study.dataset("sciq") is None


def test_accepts_values_given_on_the_command_line():
    given = {"epochs": "3", "max_steps": "null", "merge": "true", "learning_rate": "1e-4", "seeds": ["1", "2"]}
    finetune = load({"finetune": given, "seed": 7}).finetune.model_dump()
    assert [finetune[key] for key in given] == [3, None, True, 0.0001, [1, 2]]
    assert load({"models": {"Llama": {"parameters": "8.03e9"}}}).models["Llama"].parameters == 8030000000


@given(st.integers(0, 10**15) | st.floats(1e-300, 1e29) | st.booleans())
def test_a_number_or_boolean_means_the_same_written_as_text(value):
    kind = {int: int | None, float: forms.Number, bool: bool}[type(value)]
    assert forms.as_read(str(value), forms.form_of(kind)) == value


@given(st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs"))))
def test_text_stays_text_for_a_key_of_text(text):
    assert forms.as_read(text, forms.form_of(str)) == text


LEAVES = [key.path for key in keys.every_key() if not key.is_section and "[]" not in "".join(key.path)]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(LEAVES), ANYTHING)
def test_accepts_any_value_at_a_key_or_names_the_key(path, value):
    names = {"models": "Llama", "datasets": "ptb", "select": "best_acc", "evaluate": "piqa", "finetune": "alpaca"}
    names["ablations"] = "r"
    keys = [names[path[0]] if key == "<name>" else key for key in path]
    config = node = copy.deepcopy(MODEL)
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value
    try:
        settings.load(config)
    except settings.SettingsError as error:
        assert keys[0] in str(error) or "study has no" in str(error)


def test_an_adapter_key_overrides_its_preset_which_overrides_the_default():
    lora = load({"finetune": {"lora": {"preset": "full", "r": "24", "use_dora": "true"}}}).finetune.lora
    assert (lora.r, lora.alpha, lora.use_dora, lora.bias) == (24, 64, True, "none")
    assert load().finetune.lora.model_dump() == {
        "preset": None,
        "r": 8,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": "all-linear",
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init": "default",
    }


def test_null_drops_an_entry_and_leaves_out_references_to_it_with_a_notice():
    dropped = {"models": {"Qwen": None, "Mistral": "null"}, "only": {"models": ["Llama", "Qwen"]}}
    study = settings.load(merged(file("config.yaml"), dropped))
    assert "Qwen" not in study.models and "Mistral" not in study.models
    assert study.active_models() == ["Llama"]
    assert study.notices == ["config key only.models: 'Qwen' was dropped from the study and is ignored"]


def test_an_empty_section_has_its_defaults():
    assert load({"finetune": None}).finetune == load().finetune


def test_only_restricts_the_run_and_not_the_study():
    study = settings.load(merged(file("config.yaml"), {"only": {"models": ["Qwen", "Llama"], "configs": ["best_ppl"]}}))
    assert study.pairs() == [("Llama", "best_ppl"), ("Qwen", "best_ppl")]
    assert len(study.models) == 6


def test_a_model_may_have_its_own_grid():
    grid = [{"method": "width", "ratio": 0.3, "name": "light"}, {"method": "depth", "ratio": 0.5, "consecutive": True}]
    study = load({"models": {"Mine": {"base": "miniature/qwen", "prune": grid}}})
    assert list(study.candidates("Mine")) == ["light", "depth-0.5-consecutive"]
    light = study.candidates("Mine")["light"]
    assert (light["importance"], light["parts"]) == ("taylor", ["mlp", "attention"])
    assert list(study.candidates("Llama")) == ["depth-0.25", "width-0.25-taylor"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "models:\n  A: {base: a/b}\n  B: {base: a/c}\n  A: {base: a/d}\n",
            "models.A is given twice, in lines 2 and 4",
        ),
        ("seed: 1\nfinetune: {epochs: 1, epochs: 2}\n", "finetune.epochs is given twice, in lines 2 and 2"),
        ("candidates:\n  prune:\n    - {ratio: 1, ratio: 2}\n", "candidates.prune.0.ratio is given twice"),
        ('{\n\t"seed": 1,\n\t"seed": 2\n}', "key seed is given twice, in lines 2 and 3"),
        ("seed: [1\n", "line 2: is not valid YAML"),
    ],
)
def test_rejects_a_key_given_twice_in_a_file(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    error = message(configfiles=[path])
    assert expected in error and str(path) in error


@pytest.mark.parametrize(
    "target",
    [
        "results/finetuned_evaluation/Llama/best_acc_finetuned/comparison_report.txt",
        "results/finetuned/Llama/best_ppl_finetuned/seed-43/finetuning_config.json",
        "./results/candidates/Llama/depth-0.25/pruning.json",
        "results/for_finetuning/SUMMARY.md",
        "results/candidates.tsv",
        "results/dense_evaluation/Llama/evaluation_results.json",
        "elsewhere/candidates/Nobody/x",
        "results/ablation/mine/ablation_report.html",
        "results/ablation/mine/light/seed-42/arm.json",
        "evaluate",
    ],
)
def test_accepts_targets_of_the_study(target):
    settings.check_targets(load({"ablations": ABLATIONS}), [target])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("results/finetuned_evaluation/Lama/best_acc_finetuned/comparison_report.txt", "no model 'Lama'"),
        ("results/finetuned/Llama/best_ac_finetuned/training_log.txt", "did you mean 'best_acc_finetuned'?"),
        ("results/for_finetuning/Llama/best_pp/selection_info.json", "did you mean 'best_ppl'?"),
        ("results/candidates/Llama/depth-0.3/pruning.json", "no candidate of Llama 'depth-0.3'"),
        ("{absolute}/results/dense_evaluation/Qwen/ppl_results.json", "valid are Llama"),
        ("results/ablation/mind/ablation_report.html", "no ablation 'mind' in the study; valid are mine, gone"),
        ("results/ablation/gone/ablation_report.html", "starts from Nobody, which is not in the study"),
        ("results/ablation/mine/lite/seed-42/arm.json", "no arm of mine 'lite'"),
    ],
)
def test_rejects_a_target_of_an_unknown_model_config_or_candidate(tmp_path, target, expected):
    target = target.format(absolute=tmp_path)
    with pytest.raises(settings.SettingsError) as raised:
        settings.check_targets(load({"ablations": ABLATIONS}, workdir=tmp_path), ["all", target])
    assert expected in str(raised.value) and target in str(raised.value)


def test_rewrites_the_reference_page_only_on_request(tmp_path, monkeypatch, capsys):
    fresh = (CONFIG / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(old := fresh.replace("| default |", "| standard |"), encoding="utf-8")
    with pytest.raises(SystemExit):
        reference.main(["--help"])
    assert reference.main(["--check"]) == 1 and "is out of date" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == old
    assert reference.main([]) == 0 and reference.main(["--check"]) == 0
    assert page.read_text(encoding="utf-8") == fresh
    assert (tmp_path / "schema.json").read_text() == (CONFIG / "schema.json").read_text()


def test_the_files_made_from_the_models_are_up_to_date():
    assert reference.main(["--check"]) == 0, "run: python -m coppice.study.settings.reference"


@pytest.mark.parametrize("name", ["config.yaml", "full.yaml", "local_data.yaml"])
def test_an_editor_accepts_the_shipped_files_and_marks_mistakes(name):
    text = (CONFIG / name).read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    editor = jsonschema.Draft202012Validator(json.loads((CONFIG / "schema.json").read_text(encoding="utf-8")))
    assert not list(editor.iter_errors(file(name)))
    assert editor.is_valid(dropped := {"models": {"Qwen": None}}) and settings.load(merged(file("full.yaml"), dropped))
    for wrong in (
        {"epoch": 1},
        {"learning_rate": 0},
        {"report_to": ["x"]},
        {"seeds": [1, 1]},
        {"data": {"dataset": 3}},
    ):
        assert not editor.is_valid({"finetune": wrong}), wrong


def test_the_reference_page_documents_every_key():
    text = (CONFIG / "README.md").read_text(encoding="utf-8")
    for path in LEAVES:
        # A model's own sections are documented with those of the study, `base` with an arm
        if path[2:3] not in (("calibration",), ("finetune",), ("evaluate",), ("base",)):
            assert f"`{checking.dotted(path)}`" in text
    for key in keys.every_key():
        assert key.description, key.path
        assert (
            not key.required
            or key.path[-1] in {"models", "base", "method", "ratio", "seq_len", "<name>"}
            or (key.path[0] == "ablations" and key.path[-1] in {"start", "name", "vary"})
        ), key.path


def test_reading_the_configuration_imports_nothing_heavy():
    code = "import sys; from coppice.study import settings; print(*sys.modules)"
    folder = Path(settings.__file__).parents[3]
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert not {"torch", "transformers", "pandas", "numpy", "datasets", "lm_eval"} & set(modules.split())
