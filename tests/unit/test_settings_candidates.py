"""A user's own table of candidates, and the settings that must agree with the stages that use them."""

import pytest
from test_settings import load, message

from coppice import miniature
from coppice.stages.evaluate import perplexity
from coppice.stages.prune import grid
from coppice.study import settings
from coppice.study.settings import keys, lora_presets, registry


@pytest.fixture
def table(tmp_path):
    """Return `write(text, name)`, which writes a table beside three checkpoint folders a, b and c.

    It returns the configuration that names the table.
    """
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")

    def write(text, name="mine.tsv"):
        text = text if name.endswith(".csv") else text.replace(",", "\t")
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        return {"candidates": {"table": name}}

    return write


HEADER = "model,candidate,path,acc,ppl,sparsity\n"


@pytest.mark.parametrize("name", ["mine.tsv", "mine.csv"])
def test_a_table_of_checkpoints_replaces_the_grid(tmp_path, table, name):
    study = load(table(HEADER + "Llama,wide,a,0.61,11.8,0.5\n\nLlama,deep,./b,,,0.25\n", name), workdir=tmp_path)
    wide, deep = study.candidates("Llama").values()
    assert (wide["candidate"], wide["path"], wide["acc"], wide["ppl"]) == ("wide", str(tmp_path / "a"), 0.61, 11.8)
    assert wide["given"] == {"acc": 0.61, "ppl": 11.8, "sparsity": 0.5}
    assert (deep["path"], deep["acc"], deep["ppl"], deep["given"]) == (
        str(tmp_path / "b"),
        None,
        None,
        {"sparsity": 0.25},
    )


def test_a_column_of_the_table_can_be_a_criterion(tmp_path, table):
    criterion = {"select": {"configs": {"sparsest": {"metric": "sparsity", "mode": "max"}}}}
    rows = HEADER + "Llama,wide,a,,,0.5\nLlama,deep,b,,,{}\n"
    assert load(table(rows.format("0.25")), criterion, workdir=tmp_path).pairs() == [("Llama", "sparsest")]
    assert "mine.tsv, row 3, column sparsity: must be a finite number" in message(
        table(rows.format("")), criterion, workdir=tmp_path
    )


def test_a_column_of_a_measured_metric_holds_numbers_or_nothing(tmp_path, table):
    task = {"evaluate": {"zero_shot": {"tasks": ["sciq"]}}}
    criterion = task | {"select": {"configs": {"best": {"metric": "sciq", "mode": "max"}}}}
    rows = "model,candidate,path,sciq\nLlama,wide,a,0.8\nLlama,deep,b,{}\n"
    assert load(table(rows.format("")), criterion, workdir=tmp_path).candidates("Llama")["deep"]["given"] == {}
    error = message(table(rows.format("n/a")), criterion, workdir=tmp_path)
    assert "mine.tsv, row 3, column sciq: must be a finite number" in error


def test_adding_a_row_above_a_candidate_does_not_change_it(tmp_path, table):
    row, other = "Llama,wide,a,,,\n", "Llama,deep,b,,,\n"
    before = load(table(HEADER + row), workdir=tmp_path).candidates("Llama")["wide"]
    assert load(table(HEADER + other + row), workdir=tmp_path).candidates("Llama")["wide"] == before


def test_all_candidates_share_a_job_only_if_the_models_name_them_alike(tmp_path, table):
    all_in_one = {"candidates": {"table": "mine.tsv", "per_job": "all"}, "models": {"Qwen": {"base": "miniature/qwen"}}}
    rows = "Llama,wide,a,,,\nLlama,deep,b,,,\nQwen,wide,c,,,\n"
    table(HEADER + rows)
    study = load(all_in_one, workdir=tmp_path)
    assert not study.shares_candidate_jobs()
    assert "these differ; each candidate gets a job of its own" in "".join(study.notices)
    table(HEADER + rows + "Qwen,deep,c,,,\n")
    study = load(all_in_one, workdir=tmp_path)
    assert study.shares_candidate_jobs() and not study.notices


def test_leaves_out_rows_of_a_model_outside_the_study_with_a_notice(tmp_path, table):
    study = load(table(HEADER + "Llama,wide,a,,,\nLlamma,wide,b,,,\n"), workdir=tmp_path)
    assert study.notices == [
        "mine.tsv: model 'Llamma' is not in the study; its rows are ignored; did you mean 'Llama'?"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model,candidat,path\nLlama,x,a\n",
            "row 1: the column candidate is missing (found model, candidat, path); did",
        ),
        ("model,candidate,path,acc,acc\nLlama,x,a,1,1\n", "row 1: the column 'acc' appears twice"),
        (HEADER + "Llama,x,a,,,\nLlama,y,b,,,\nLlama,x,c,,,\n", "row 4, column candidate: model 'Llama' already has a"),
        (HEADER + "Llama,x,nowhere,,,\n", "row 2, column path: there is no folder nowhere"),
        (HEADER + "Llama,x,.,,,\n", "row 2, column path: . is not a checkpoint folder, because it has no config.json"),
        (HEADER + "Llama,x,model.pt,,,\n", "import_pickle.py model.pt OUT --i-trust-this-file"),
        (HEADER + "Llama,x,a,nan,,\n", "row 2, column acc: found 'nan', must be a number from 0 to 1"),
        (HEADER + "Llama,x,a,61,,\n", "row 2, column acc: found '61'"),
        (HEADER + "Llama,x,a,high,,\n", "row 2, column acc: found 'high'"),
        (HEADER + "Llama,x,a,,inf,\n", "row 2, column ppl: found 'inf', must be a finite number of at least 1"),
        (HEADER + "Llama,x,a,,0.9,\n", "row 2, column ppl: found '0.9'"),
        (
            "model,candidate,path,average_acc\nLlama,x,a,61.2\n",
            "row 2, column average_acc: found '61.2', must be a number",
        ),
        ("model,candidate,path,average_acc\nLlama,x,a,n/a\n", "row 2, column average_acc: found 'n/a'"),
        ("model,candidate,path,piqa\nLlama,x,a,nan\n", "row 2, column piqa: found 'nan', must be a number from 0 to 1"),
        ("model,candidate,path,ppl.ptb\nLlama,x,a,-3\n", "row 2, column ppl.ptb: found '-3', must be a finite number"),
        (
            "model,candidate,path,acc,average_acc\nLlama,x,a,,\n",
            "row 1: the columns acc and average_acc both give average_acc",
        ),
        ("model,candidate,path,ppl.ptb,ppl\nLlama,x,a,,\n", "row 1: the columns ppl and ppl.ptb both give ppl.ptb"),
        (HEADER + "Llama,x,a\n", "row 2: has 3 cells, but the header has 6"),
        (HEADER + "Llama,,a,,,\n", "row 2, column candidate: is empty"),
        (HEADER + "Llama,x/y,a,,,\n", "row 2, column candidate: the name 'x/y' cannot be part of a path"),
        (HEADER + "Qwen,x,a,,,\n", "has no row for model 'Llama'"),
        (HEADER, "the table has no rows"),
        ("", "row 1: the column model is missing (found none)"),
    ],
)
def test_names_the_row_and_column_of_a_wrong_cell(tmp_path, table, text, expected):
    error = message(table(text), workdir=tmp_path)
    assert expected in error and "mine.tsv" in error and "\n" not in error


def test_a_column_named_like_an_unmeasured_metric_may_hold_anything(tmp_path, table):
    rows = "model,candidate,path,ppl,ppl.c4,boolq\nLlama,x,a,9,n/a,61.2\n"
    tasks = {"evaluate": {"zero_shot": {"tasks": ["piqa"]}}}
    found = load(table(rows), tasks, workdir=tmp_path).candidates("Llama")["x"]["given"]
    assert found == {"ppl": 9.0, "ppl.c4": "n/a", "boolq": 61.2}


def test_names_the_row_of_a_candidate_with_braces_in_a_file_name(tmp_path, table):
    (tmp_path / "a/model{1}.safetensors").touch()
    (tmp_path / "a/.hidden{1}").touch()
    error = message(table(HEADER + "Llama,x,a,,,\n"), workdir=tmp_path)
    assert "mine.tsv, row 2, column path: found" in error and "model{1}.safetensors'; Snakemake" in error


def test_rejects_a_missing_table(tmp_path):
    assert "candidates.table: there is no file no.tsv" in message({"candidates": {"table": "no.tsv"}}, workdir=tmp_path)


def test_accepts_only_targets_of_candidates_in_the_table(tmp_path, table):
    study = load(table(HEADER + "Llama,wide,a,,,\n"), workdir=tmp_path)
    settings.check_targets(study, ["results/candidates/Llama/wide/pruning.json"])
    with pytest.raises(settings.SettingsError, match="did you mean 'wide'"):
        settings.check_targets(study, ["results/candidates/Llama/wid/pruning.json"])


def test_the_keys_offer_what_the_stages_implement():
    choices = {".".join(key.path): key.form.choices for key in keys.every_key()}
    assert set(registry.PROTOCOLS) == set(perplexity.PROTOCOLS)
    roles = {
        name: {text: role for text, role in protocol.role.items() if text}
        for name, protocol in perplexity.PROTOCOLS.items()
    }
    assert {name: texts for name, texts in roles.items() if texts} == registry.PROTOCOL_ROLES
    assert all(protocol.role[""] == "report" for protocol in perplexity.PROTOCOLS.values())
    with_bos = [name for name, protocol in perplexity.PROTOCOLS.items() if protocol.bos == "every-window"]
    assert with_bos == list(registry.PROTOCOLS_WITH_BOS)
    assert set(choices["finetune.lora.preset"]) == {*lora_presets.PRESETS, None}
    of_kinds = {*registry.PICTURE_DATASETS, *registry.CODE_DATASETS}
    assert set(registry.MINIATURE_DATASETS) - of_kinds <= set(miniature.DATASETS)


def test_pruning_accepts_every_point_of_a_grid():
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=4, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)
    points = [{"method": "depth", "ratio": 0.25}, {"method": "width", "ratio": 0.5}]
    for point in load({"candidates": {"prune": points}}).candidates("Llama").values():
        assert grid.resolve(point, config).settings == {key: value for key, value in point.items() if key != "name"}
