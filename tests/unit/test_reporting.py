"""The study's report and its table in the terminal, from records for which no model ran."""

import html
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pandas
import pytest
from rich.console import Console
from scipy.fft import dct
from synthetic_records import SIX, Synthetic

from coppice import cli
from coppice.core import fingerprints, records
from coppice.planning.snakemake_compat import FailedJob
from coppice.render import html as templates
from coppice.report import study_report
from coppice.report.study_report import answers, csv_tables, evidence, failures, group_answers, measurements
from coppice.report.study_report import study_records as studies
from coppice.stats import across_models

SMALL = {"items": 40, "windows": 20}
STAGES = ("pruned", "finetuned")
EVIL = "<script>alert(1)</script>"

COST = {
    "macs_per_token": {"linear": 1000},
    "nonzero_parameters": 90,
    "parameters": 100,
    "weight_bytes": 400,
    "speed": [{"batch_size": 1, "prefill_tokens_per_second": 80.0, "decode_seconds_per_token": 0.0125}],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a complete study of six models by two configs, with its report."""
    study = Synthetic(tmp_path_factory.mktemp("whole"), **SMALL).build()
    study_report.write_report(study.results, study.pairs, study.models, study.results / "report", {"seed": 42})
    return study


@pytest.fixture
def study_copy(whole, tmp_path):
    """Return a copy of the study without its report, which a test may damage."""
    shutil.copytree(whole.results, tmp_path / "results", ignore=shutil.ignore_patterns("report"))
    other = Synthetic(tmp_path / "results", whole.models, whole.configs, **SMALL)
    return other


def _render(study, pairs=None, models=None, metadata=None):
    output = study.results / "report"
    study_report.write_report(study.results, pairs or study.pairs, models or study.models, output, metadata)
    return (output / "study_report.html").read_text(), (output / "study_report.md").read_text()


@pytest.fixture
def no_figures(monkeypatch):
    """Skip the drawing, which takes most of the time, in tests of text."""
    from coppice.report.study_report import figures

    monkeypatch.setattr(figures, "draw", lambda study, frames, folder: [])


def _answers(study, pairs=None, models=None):
    found = studies.read(study.results, pairs or study.pairs, models or study.models)
    return {answer.key: answer for answer in answers.answers(found, measurements.gather(found))}


class _Page(HTMLParser):
    """Collects the tags, outside addresses and ids of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.ids, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.addresses.append(value)
            assert not name.startswith("on"), f"<{tag} {name}>"


def test_writes_every_promised_file(whole):
    report = whole.results / "report"
    names = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in study_report.FIGURES for kind in ("png", "svg")}
    expected = {"study_report.html", "study_report.md", *(f"{name}.csv" for name in study_report.TABLES), *figures}
    assert names == expected


def test_the_page_loads_nothing_from_outside(whole):
    text = (whole.results / "report" / "study_report.html").read_text()
    page = _Page(text)
    assert page.addresses == []
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert page.tags.count("svg") == len(study_report.FIGURES)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_and_the_markdown_hold_all_five_answers_and_all_pairs(whole):
    for name in ("study_report.html", "study_report.md"):
        text = (whole.results / "report" / name).read_text()
        for answer in _answers(whole).values():
            assert answer.question in text
        for model, config in whole.pairs:
            assert model in text and config in text
        for word in ("gptq-2048", "2.13.0", "openbookqa", "candidate-0", "wrong to right", "alpha 16"):
            assert word in text or (name.endswith("md") and word == "wrong to right")


def test_the_tables_hold_the_numbers_of_the_records(whole):
    frame = pandas.read_csv(whole.results / "report" / "comparisons.csv").set_index(["model", "config"])
    assert len(frame) == 12
    record = records.read(whole.folder("finetuned", "Qwen", "best_ppl") / "comparison.json")
    row = frame.loc["Qwen", "best_ppl"]
    for stage in ("dense", "pruned", "finetuned"):
        assert row[f"average_acc_{stage}"] == pytest.approx(record["average_acc"][stage]), stage
        assert row[f"ppl.wikitext2_{stage}"] == pytest.approx(record["perplexity"]["wikitext2"][stage]), stage
    assert row["average_acc_recovered_low"] == pytest.approx(record["average_acc"]["recovered"]["interval"][0])
    assert row["ppl.ptb_dense"] == pytest.approx(record["perplexity"]["ptb"]["dense"])
    tasks = pandas.read_csv(whole.results / "report" / "tasks.csv")
    assert len(tasks) == 12 * 7
    shown = tasks[(tasks.model == "Qwen") & (tasks.config == "best_ppl") & (tasks.task == "piqa")].iloc[0]
    recorded = record["zero_shot"]["piqa"]
    for column in ("n", "dense", "pruned", "finetuned", "gained_items", "lost_items", "p", "p_holm"):
        assert shown[column] == pytest.approx(recorded[column]), column
    assert (shown["change"], shown["verdict"]) == (pytest.approx(recorded["change"]["value"]), recorded["verdict"])


@pytest.mark.slow
def test_answers_find_the_planted_effects(tmp_path):
    study = Synthetic(tmp_path, items=200, windows=20).build()  # best_ppl was made the worse start
    found = _answers(study)
    assert found["start"].verdict == evidence.GENERAL
    assert found["start"].sentence.startswith("best_acc is a better start")
    assert found["recovery"].verdict == evidence.GENERAL
    share = re.search(r"(\d+) %", found["recovery"].sentence)
    assert 45 < int(share[1]) < 75  # skill 0.35 to 0.75, of 1.0, less for best_ppl
    assert found["variants"].verdict in (evidence.CLEAR, evidence.UNDECIDED)


def test_the_report_gives_the_intervals_of_the_comparisons(whole):
    """The same quantity has the same interval in both, although the report takes all models together."""
    study = studies.read(whole.results, whole.pairs, whole.models)
    measured = measurements.gather(study)
    for pair in study.compared[::5]:
        _, pruned, finetuned = evidence.columns(pair)
        for metric, means in measured.means.items():
            part = pair.measured(metric)
            change = means.contrast({finetuned: 1, pruned: -1})
            change = across_models.ratio_of(change) if metric.log else change
            recorded = part["ratio" if metric.log else "change"]
            assert change["interval"] == pytest.approx(recorded["interval"], rel=1e-9), metric
            shown = means.exp() if metric.log else means
            share = shown.ratio(*evidence.shares(metric, [pair]))
            assert share["interval"] == pytest.approx(part["recovered"]["interval"], rel=1e-9), metric


def test_models_that_read_the_same_windows_are_compared_window_by_window(tmp_path):
    """The interval of their mean change is that of the windows' mean changes, by scipy's cosine transform."""
    study = Synthetic(tmp_path, dict(list(SIX.items())[:2]), configs=("best_acc",), items=30, windows=24).build()
    folders = {(model, stage): study.folder(stage, model, "best_acc") for model in study.models for stage in STAGES}
    texts = {key: records.read(folder / "ppl_results.json")["perplexity"]["ptb"] for key, folder in folders.items()}
    losses = {key: [one["nll_per_token"] for one in text["window_losses"]] for key, text in texts.items()}
    changes = [numpy.subtract(losses[model, "finetuned"], losses[model, "pruned"]) for model in study.models]
    waves = dct(numpy.mean(changes, axis=0), norm="ortho")[1:4]

    signs = (("pruned", -1), ("finetuned", 1))

    def pooled():
        found = measurements.gather(studies.read(study.results, study.pairs, study.models))
        means = next(means for metric, means in found.means.items() if metric.name == "ptb")
        terms = {(model, "best_acc", stage): sign / 2 for model in study.models for stage, sign in signs}
        return means.error(terms)[0], found.notes

    error, notes = pooled()
    assert error == pytest.approx(numpy.sqrt((waves**2).mean() / 24)) and not any("independent" in n for n in notes)

    for folder in [study.folder("dense", "Llama"), *(folders["Llama", stage] for stage in STAGES)]:
        found = records.read(folder / "ppl_results.json")
        for one in found["perplexity"]["ptb"]["window_losses"]:
            one["tokens"] = 2000
        records.write(folder / "ppl_results.json", found)
    apart, notes = pooled()
    own = [numpy.sqrt((dct(change, norm="ortho")[1:4] ** 2).mean() / 24) for change in changes]
    assert apart == pytest.approx(numpy.hypot(*own) / 2)
    assert any("ptb" in note and "different windows, which are taken as independent" in note for note in notes)


@pytest.mark.parametrize(
    ("differences", "verdict", "words"),
    [
        ([1, 2], evidence.CLEAR, "too few models that differ .* 2, and it takes 5"),
        ([1, 2, 3, 4, 0, 0], evidence.CLEAR, "too few models that differ .* 4, and it takes 5"),
        ([1, 2, 3, 4, 5], evidence.CLEAR, "differ too much"),  # 2 of 2^5 signs are as far from zero: p = .0625
        ([1, 2, 3, 4, 5, 6], evidence.GENERAL, "agree enough"),
        ([1, -2, 3, 4, 5, 6], evidence.CLEAR, "differ too much"),
    ],
)
def test_a_clear_answer_is_general_only_if_the_test_over_models_says_so(differences, verdict, words):
    found, sentence = evidence.beyond("differ", differences)
    assert found == verdict and re.search(words, sentence)


def test_an_answer_about_two_models_is_not_general(tmp_path):
    found = _answers(Synthetic(tmp_path, dict(list(SIX.items())[:2]), items=200, windows=20).build())["start"]
    assert found.verdict == "clear for these models"
    assert "too few models that differ to say anything about other models: 2" in " ".join(found.support)


@pytest.mark.slow
def test_finds_an_architecture_that_recovers_more(tmp_path):
    study = Synthetic(tmp_path, items=200, windows=20)
    plain = study._evaluation

    def better_qwen(folder, identity, skill):
        gift = 0.2 if identity["model"].startswith("Qwen") and identity["stage"] == "finetuned" else 0
        plain(folder, identity, skill + gift)

    study._evaluation = better_qwen
    found = _answers(study.build())["families"]
    assert found.verdict == evidence.CLEAR
    assert "qwen recovers" in found.sentence and "more than llama" in found.sentence


def test_does_not_report_a_difference_within_the_noise(tmp_path):
    study = Synthetic(tmp_path, dict(list(SIX.items())[:2]), **SMALL)
    model = study._model

    def alike(name):  # both configs get the same skill
        study.configs, both = study.configs[:1], study.configs
        model(name)
        study.configs = both[1:]
        model(name)
        study.configs = both

    study._model = alike
    found = _answers(study.build())
    assert found["start"].verdict == evidence.UNDECIDED
    assert found["start"].sentence.startswith("Not enough evidence")


def test_reports_a_study_of_one_model_and_one_config(tmp_path):
    study = Synthetic(tmp_path, {"Solo": SIX["Llama"]}, configs=("best_acc",), **SMALL).build()
    found = _answers(study)
    assert {key for key, answer in found.items() if answer.verdict == evidence.ABSENT} == {
        "start",
        "families",
        "variants",
    }
    page, _ = _render(study)
    assert "Solo" in page and "0 models" not in page
    assert "<dt>selection</dt><dd>seed 42</dd>" in re.sub(r">\s+<", "><", page)


@pytest.mark.slow
def test_compares_three_configs_two_by_two(tmp_path):
    study = Synthetic(tmp_path, dict(list(SIX.items())[:2]), ("best_acc", "best_ppl", "smallest"), **SMALL).build()
    start = _answers(study)["start"]
    assert "best_acc, best_ppl or smallest" in start.question
    lines = " ".join([start.sentence, *start.support])
    for config in study.configs:
        assert config in lines
    page, _ = _render(study)
    assert page.count("chosen by") == 6


def test_the_report_shows_how_much_of_the_teacher_is_back(study_copy, no_figures):
    path = study_copy.folder("trained", "Llama", "best_acc") / "finetuning_config.json"
    records.write(path, records.read(path) | {"kl_to_teacher": {"before": 1.3701, "after": 0.28}})
    assert all("1.3701 nats per target before training, 0.2800 after" in one for one in _render(study_copy))


def test_answers_carry_the_warnings_of_the_numbers_that_they_quote(study_copy, no_figures):
    path = study_copy.folder("finetuned", "Llama", "best_acc") / "comparison.json"
    records.write(path, records.read(path) | {"warnings": ["the validation loss never fell"]})
    found = _answers(study_copy)
    for key in ("start", "recovery", "tradeoff", "families", "variants"):
        assert "Llama / best_acc: the validation loss never fell" in found[key].warnings, key
        assert any(text.startswith("11 of 12 pairs: fewer than 100 items") for text in found[key].warnings), key
    page, text = _render(study_copy)
    assert all(
        document.partition("All models")[0].count("validation loss never fell") == 5 for document in (page, text)
    )
    others = [pair for pair in study_copy.pairs if pair[0] != "Llama"]
    assert "never fell" not in str(_answers(study_copy, others))


def test_answers_say_that_models_were_measured_differently(study_copy):
    path = study_copy.folder("dense", "Qwen") / "evaluation_results.json"
    record = records.read(path)
    record["perplexity"]["wikitext2"]["protocol"]["seq_len"] = 1024
    record["zero_shot"]["piqa"]["engine"] = "prefix-tree"
    records.write(path, record)
    warnings = " ".join(_answers(study_copy)["tradeoff"].warnings)
    assert "different seq_len in different models (2048 and 1024)" in warnings
    assert "piqa: measured with different engine in different models (lm-eval and prefix-tree)" in warnings
    assert "different" not in " ".join(_answers(study_copy, [("Llama", "best_acc")])["tradeoff"].warnings)


def test_leaves_a_model_without_its_partner_out_of_the_last_question(study_copy):
    models = {name: facts for name, facts in SIX.items() if name != "Qwen"}
    pairs = [(model, config) for model in models for config in study_copy.configs]
    support = " ".join(_answers(study_copy, pairs, models)["variants"].support)
    assert "4 pairs of 2 models" in support


def test_counts_a_candidate_that_two_configs_chose_once(study_copy):
    """The means are those of a study without the second config; the tables still list it."""
    path = study_copy.folder("finetuned", "Llama", "best_ppl") / "comparison.json"
    records.write(path, records.read(path) | {"candidate": "candidate-0"})
    shared = _answers(study_copy)
    without = _answers(study_copy, [pair for pair in study_copy.pairs if pair != ("Llama", "best_ppl")])
    for key in ("recovery", "families"):
        assert shared[key].sentence == without[key].sentence and shared[key].support == without[key].support
    assert "over 11 pairs of 6 models" in shared["recovery"].support[0]
    study = studies.read(study_copy.results, study_copy.pairs, study_copy.models)
    assert len(csv_tables.comparisons(study)) == 12


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("Llama Llama-Instruct", {"Llama": "Llama-Instruct"}),
        ("Mistral-7B-v0.3 Mistral-Instruct-7B", {"Mistral-7B-v0.3": "Mistral-Instruct-7B"}),
        ("L-7B L-13B L-7B-Instruct", {"L-7B": "L-7B-Instruct"}),
        ("L L2 L2-Instruct L-Instruct", {"L": "L-Instruct", "L2": "L2-Instruct"}),
        ("L-7B-v1 L-13B-v1 L-13B-Instruct-v1 L-7B-it-v1", {"L-7B-v1": "L-7B-it-v1", "L-13B-v1": "L-13B-Instruct-v1"}),
        ("L-7B L-13B M-Instruct", {}),
        ("L-7B M-Instruct N-Instruct", {}),
    ],
)
def test_partners_have_the_same_size(tmp_path, names, found):
    """In a family with two sizes, the larger base model is not compared with the smaller instruct model."""
    variant = {name: "instruct" if re.search("Instruct|-it", name) else "base" for name in names.split()}
    models = {name: {"variant": kind, "family": "llama"} for name, kind in variant.items()}
    study = studies.read(tmp_path, [(name, "best_acc") for name in models], models)
    assert dict(group_answers.partners(study)) == found


@pytest.mark.slow
def test_lists_what_is_missing_and_renders_the_rest(study_copy):
    shutil.rmtree(study_copy.folder("finetuned", "Mistral", "best_acc"))
    shutil.rmtree(study_copy.folder("trained", "Mistral", "best_acc"))
    shutil.rmtree(study_copy.folder("dense", "Qwen"))
    (study_copy.results / "candidates.tsv").unlink()
    shutil.rmtree(study_copy.folder("finetuned", "Llama", "best_ppl") / "samples")
    page, text = _render(study_copy)
    for document in (page, text):
        assert "Mistral / best_acc: comparison" in document
        assert "Qwen: dense evaluation" in document
        assert "table of candidates" in document
        assert "no usable samples of boolq" in document
    frame = pandas.read_csv(study_copy.results / "report" / "comparisons.csv").set_index(["model", "config"])
    row = frame.loc["Mistral", "best_acc"]
    assert row["state"] == "waiting" and pandas.isna(row["average_acc_finetuned"])
    assert row["average_acc_pruned"] > 0


def test_reports_a_study_in_which_nothing_is_done_yet(tmp_path):
    study = Synthetic(tmp_path / "results")
    study.results.mkdir()
    page, _ = _render(study)
    assert page.count("not enough evidence") >= 5
    assert _Page(page).tags.count("svg") == len(study_report.FIGURES)


@pytest.mark.slow
def test_reports_damaged_records_and_nan_as_failures(study_copy):
    torn = study_copy.folder("finetuned", "Llama", "best_acc") / "comparison.json"
    torn.write_text(torn.read_text()[:500])
    spoiled = study_copy.folder("pruned", "Qwen", "best_ppl") / "evaluation_results.json"
    spoiled.write_text(re.sub(r'"average_acc": [\d.]+', '"average_acc": NaN', spoiled.read_text()))
    changed = study_copy.folder("trained", "Mistral", "best_acc") / "finetuning_config.json"
    changed.write_text(changed.read_text().replace('"steps": 120', '"steps": 121'))
    (study_copy.results / "candidates.tsv").write_text("\0\0")
    page, _ = _render(study_copy)
    for what in ("comparison.json", "evaluation_results.json", "finetuning_config.json", "candidates.tsv"):
        assert re.search(rf"<li>[^<]*<span[^>]*>[^<]*{what}", page), what
    frame = pandas.read_csv(study_copy.results / "report" / "comparisons.csv").set_index(["model", "config"])
    assert frame.loc["Llama", "best_acc"]["state"] == "failed"
    assert not re.search(r">\s*nan\b", page, re.IGNORECASE)


def test_names_and_leaves_out_samples_that_are_not_parquet(study_copy):
    (study_copy.folder("finetuned", "Llama", "best_ppl") / "samples" / "piqa.parquet").write_text("not parquet")
    found = studies.read(study_copy.results, study_copy.pairs, study_copy.models)
    (note,) = measurements.gather(found).notes
    assert note.startswith("Llama best_ppl finetuned: no usable samples of piqa") and "piqa.parquet" in note


def test_markdown_has_plain_quotes_and_html_escaped_ones(tmp_path):
    shown = {}
    for kind in ("html", "md"):
        (tmp_path / f"page.{kind}.j2").write_text("{{ text }}")
        shown[kind] = templates.render(tmp_path, f"page.{kind}.j2", {"text": "a 'b' \"c\" <d> &#39;"})
    assert shown["html"] == "a &#39;b&#39; &#34;c&#34; &lt;d&gt; &amp;#39;"
    assert shown["md"] == "a 'b' \"c\" &lt;d&gt; &amp;#39;"


@pytest.mark.slow
def test_escapes_a_name_that_is_markup(tmp_path):
    models = {EVIL: SIX["Llama"], "$a_b$ | c": SIX["Llama-Instruct"]}
    study = Synthetic(tmp_path, models, **SMALL).build()
    page, text = _render(study, metadata={"<b>note": "<img src=x onerror=alert(2)>"})
    parsed = _Page(page)
    assert parsed.tags.count("script") == 1  # the one that sorts
    assert "img" not in parsed.tags and parsed.addresses == []
    assert EVIL not in page and EVIL not in text and "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for path in (study.results / "report" / "figures").glob("*.svg"):
        assert "<script" not in re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)


def test_shows_generations_and_cost_if_the_records_have_them(study_copy, no_figures):
    path = study_copy.folder("finetuned", "Llama", "best_acc") / "comparison.json"
    samples = [{"prompt": "Once & once", "dense": "upon", "pruned": "a", "finetuned": "time"}]
    records.write(path, records.read(path) | {"generations": samples})
    evaluated = study_copy.folder("pruned", "Llama", "best_acc") / "evaluation_results.json"
    records.write(evaluated, records.read(evaluated) | {"cost": COST})
    page, _ = _render(study_copy)
    assert "Once &amp; once" in page and "100 parameters, 90 nonzero;" in page
    assert "12.5 ms" not in page  # an earlier version timed each model in its own evaluation, beside other jobs


@pytest.mark.slow
def test_rendering_imports_neither_torch_nor_transformers(whole, tmp_path):
    code = (
        "import sys; from coppice.report import study_report as reporting\n"
        f"reporting.write_report({str(whole.results)!r}, [('Llama', 'best_acc')], {{}}, {str(tmp_path)!r}, {{}})\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    scripts = Path(study_report.__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(scripts)}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.slow
def test_renders_a_hundred_models_by_four_configs_in_a_minute(tmp_path):
    models = {f"Model-{i}": {"variant": "base", "family": f"family-{i % 5}", "base": None} for i in range(100)}
    study = Synthetic(tmp_path, models, ("a", "b", "c", "d"), items=60, windows=20).build(distinct=2)
    started = time.process_time()  # CPU time of this process: other work on the machine does not count
    _render(study)
    assert time.process_time() - started < 60


# The terminal


def _status(results, name, title, state, **facts):
    path = Path(results) / ".status" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "state": state, "reason": None, "started": time.time() - 300, "updated": time.time()}
    content |= {"host": socket.gethostname(), "pid": os.getpid()} | facts
    path.write_text(json.dumps(content))


def _shown(capsys, *arguments):
    assert cli.main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_show_lists_done_running_waiting_and_failed_pairs(study_copy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    for model, config in (("Llama", "best_ppl"), ("Qwen", "best_acc"), ("Mistral", "best_acc"), ("Qwen", "best_ppl")):
        shutil.rmtree(study_copy.folder("finetuned", model, config))
    _status(study_copy.results, "finetune/Llama.candidate-1", "finetune Llama candidate-1", "running")
    _status(study_copy.results, "finetune/x", "finetune Qwen candidate-0", "failed", reason="loss is not a number")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _status(study_copy.results, "evaluate/x", "evaluate finetuned Mistral candidate-0", "running", pid=dead.pid)
    rows = {tuple(line.split()[:2]): line for line in _shown(capsys, study_copy.results).splitlines() if line.split()}
    assert "running (finetune, 5 min)" in rows["Llama", "best_ppl"]
    assert "failed" in rows["Qwen", "best_acc"]
    assert "stopped" in rows["Mistral", "best_acc"]
    assert "waiting" in rows["Qwen", "best_ppl"]
    assert rows["Llama", "best_acc"].split()[-1] == "done"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_show_replaces_characters_that_the_terminal_lacks(study_copy, encoding):
    shutil.rmtree(study_copy.folder("finetuned", "Qwen", "best_acc"))
    _status(
        study_copy.results, "finetune/x", "finetune Qwen candidate-0", "failed", reason="the loss ≥ what Žižek hoped"
    )
    command = [sys.executable, "-m", "coppice", "show", study_copy.results]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "the loss ? what ?i?ek hoped" in done.stdout.decode(encoding)


def test_show_reports_a_full_disk_in_one_line(study_copy):
    command = [sys.executable, "-m", "coppice", "show", study_copy.results]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("coppice show: standard output: its disk is full")


def test_show_names_every_failure_with_its_reason(study_copy, capsys):
    shutil.rmtree(study_copy.folder("finetuned", "Qwen", "best_acc"))
    _status(
        study_copy.results,
        "finetune/a",
        "finetune Qwen candidate-0",
        "failed",
        reason="the training loss is not finite",
    )
    text = _shown(capsys, study_copy.results)
    assert "failed: Qwen / best_acc: finetune: the training loss is not finite" in text
    assert "12 model and config pairs: 11 done, 1 failed" in text


def test_show_omits_a_failure_that_was_fixed(study_copy, capsys):
    _status(study_copy.results, "finetune/a", "finetune Qwen candidate-0", "failed", reason="out of memory")
    assert "out of memory" not in _shown(capsys, study_copy.results)


def test_a_failed_candidate_fails_all_pairs_of_its_model(study_copy, capsys):
    for config in study_copy.configs:
        shutil.rmtree(study_copy.folder("finetuned", "Llama", config))
    _status(study_copy.results, "prune/a", "prune Llama depth-0.25", "failed", reason="disk is full")
    _status(
        study_copy.results, "prune/b", "prune Llama-Instruct depth-0.25", "failed", reason="of no concern: it is done"
    )
    assert _shown(capsys, study_copy.results).count("failed (prune: disk is full)") == 2


def _cut(text):
    return [line for line in text.splitlines() if "…" in line]


def test_a_pipe_gets_the_whole_table_at_any_terminal_width(whole, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = _shown(capsys, whole.results)
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0] in whole.models]
    assert not _cut(text) and len(rows) == 12
    assert all(len(row) == 13 and row[-1] == "done" for row in rows), "names, two times three values and a share, state"


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_a_narrow_terminal_truncates_no_number(whole, columns):
    narrow, wide = io.StringIO(), io.StringIO()
    study_report.overview(whole.results, whole.pairs, Console(file=narrow, force_terminal=True, width=columns))
    study_report.overview(whole.results, whole.pairs, Console(file=wide))
    found = [re.findall(r"\d+\.\d+", text.getvalue()) for text in (narrow, wide)]
    assert sorted(found[0]) == sorted(found[1]) and len(found[1]) == 12 * 6
    assert not _cut(narrow.getvalue())
    if columns == 80:
        assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", narrow.getvalue()).splitlines())) <= 80
        assert all(model in narrow.getvalue() for model in whole.models)


# The last lines of a failed run


def _job(folder, name, *, run="this", log=None, **status):
    """Return a failed job, and write its status file as the run `run` would."""
    path = folder / f"{name}.status.json"
    if status:
        path.write_text(json.dumps({"title": f"finetune {name}", "reason": None, "run": run} | status))
    written = folder / f"{name}.log"
    if log:
        written.write_text(log)
    return FailedJob(f"finetune_lora {name}", [str(written)], str(path))


def test_a_failed_run_ends_with_each_job_its_reason_its_log_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("COPPICE_RUN", "this")
    jobs = [
        _job(tmp_path, "A", state="failed", reason="the loss is not finite"),
        _job(tmp_path, "B", state="running"),
        _job(tmp_path, "C", state="failed", reason="of an earlier run", run="before", log="1\nKeyError: 'c'\n\n"),
        _job(tmp_path, "D"),
    ]
    text = failures.summary(jobs, ["--cores", "2", "--config", "results=my study"])
    lines = text.splitlines()
    assert lines[0] == "4 jobs failed:"
    assert "  finetune A: the loss is not finite" in lines and f"    log: {tmp_path}/A.log" in lines
    assert any(line.startswith("  finetune B:") and "killed" in line for line in lines)
    assert "  finetune_lora C: KeyError: 'c'" in lines
    assert any(line.startswith("  finetune_lora D: no reason") for line in lines)
    assert "  snakemake --cores 2 --config 'results=my study'" in lines and "of an earlier run" not in text


def test_a_job_that_was_stopped_on_purpose_is_not_listed_as_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("COPPICE_RUN", "this")
    stopped = _job(tmp_path, "A", state="stopped", reason="stopped at step 5; checkpoint-5 is written")
    text = failures.summary([stopped], ["--cores", "2"])
    assert text.splitlines()[:2] == [
        "1 job stopped before the end:",
        "  finetune A: stopped at step 5; checkpoint-5 is written",
    ]
    assert "failed" not in text and "Fix the cause" not in text and "snakemake --cores 2" in text
    both = failures.summary([stopped, _job(tmp_path, "B", state="failed", reason="NaN")], []).splitlines()
    assert both[0] == "1 job failed:" and both[1] == "  finetune B: NaN" and "1 job stopped before the end:" in both


def test_a_stopped_run_says_how_to_go_on():
    assert "snakemake --cores 2" in failures.summary([], ["--cores", "2"])


def test_finds_pairs_and_models_in_the_records(whole):
    pairs, models = studies.discover(whole.results)
    assert sorted(pairs) == sorted(whole.pairs)
    assert models["Qwen-Instruct"] == {"variant": "instruct", "family": "qwen", "base": None}
    assert models["Qwen"]["variant"] == "base"


def test_coppice_report_renders_a_partial_study(study_copy, capsys, no_figures):
    shutil.rmtree(study_copy.folder("finetuned", "Mistral", "best_acc"))
    assert cli.main(["report", str(study_copy.results)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert "Mistral / best_acc: comparison" in page.read_text()


def test_coppice_report_takes_the_study_from_its_configuration(study_copy, tmp_path, capsys, no_figures):
    config = tmp_path / "config.yaml"
    config.write_text(
        "models:\n  Llama: {base: miniature/llama}\nselect:\n  configs: {best_acc: {metric: average_acc, mode: max}}\n"
    )
    assert cli.main(["report", str(study_copy.results), "--configfile", str(config)]) == 0
    frame = pandas.read_csv(study_copy.results / "report" / "comparisons.csv")
    assert frame[["model", "config"]].to_numpy().tolist() == [["Llama", "best_acc"]]


@pytest.mark.parametrize("command", ["show", "report"])
def test_names_a_missing_folder_in_one_line(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys, coppice.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(len(sys.modules))"
    scripts = Path(study_report.__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(scripts)}, capture_output=True, text=True
    )
    assert int(run.stdout.split()[-1]) < 250, run.stderr


# The browser

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
WATCH = """<script>
const told = [];
window.alert = () => told.push("alert");
addEventListener("error", (event) => told.push(event.message));
addEventListener("load", () => {
  const table = document.getElementById("main-table");
  const column = Array.from(table.tHead.rows[1].cells).findIndex((cell) => cell.innerText.trim() === "fine-tuned");
  const read = () => Array.from(table.tBodies[0].rows).map((row) => row.cells[column].dataset.sort);
  const press = () => { table.tHead.rows[1].cells[column].querySelector("button").click(); return read(); };
  const sizes = Array.from(document.querySelectorAll("figure svg")).map((svg) => svg.getBoundingClientRect());
  const facts = {
    up: press(), down: press(), told,
    drawn: sizes.filter((size) => size.width > 100 && size.height > 50).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
  document.documentElement.dataset.facts = JSON.stringify(facts);
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_a_browser(whole, tmp_path, width):
    page = (whole.results / "report" / "study_report.html").read_text()
    watched = tmp_path / "watched.html"
    watched.write_text(page.replace("<body>", "<body>" + WATCH, 1))
    run = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom"),
            watched.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "CONSOLE" not in run.stderr

    facts = json.loads(html.unescape(re.search(r'data-facts="([^"]*)"', run.stdout)[1]))
    assert facts["told"] == []
    assert facts["drawn"] == len(study_report.FIGURES)
    assert facts["up"] == sorted(facts["up"], key=float) and facts["down"] == facts["up"][::-1]
    assert facts["overflow"] <= 0  # wide parts scroll by themselves, the page does not


def test_shows_which_ablation_jobs_run_and_why_others_failed(tmp_path):
    now, host = time.time(), socket.gethostname()
    for name, state, reason in (("light 42", "done", None), ("full 42", "running", None), ("all 42", "failed", "NaN")):
        facts = {"title": f"ablation mine {name}", "state": state, "reason": reason, "started": now, "updated": now}
        path = tmp_path / ".status/ablation" / f"mine.{name.replace(' ', '.')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts | {"host": host, "pid": os.getpid()}))
    lines = study_report.ablations(tmp_path)
    assert lines[0] == "ablation mine: jobs 1 done, 1 running, 1 failed (full 42)"
    assert lines[1] == "  failed: all 42: NaN"


def test_rejects_an_edited_table_of_candidates(study_copy, no_figures):
    table = study_copy.results / "candidates.tsv"
    records.write(study_copy.results / ".candidates.json", {"sha256": fingerprints.content_digest(table)})
    page, _ = _render(study_copy)
    assert "candidates.tsv: this table was edited" not in page
    table.write_text(table.read_text().replace("candidate-0", "my favourite"))
    page, _ = _render(study_copy)
    assert re.search("candidates.tsv: this table was edited[^<]*delete it and run snakemake", page)
    assert "my favourite" not in page
