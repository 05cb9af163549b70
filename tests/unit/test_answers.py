"""The evaluator `answers`: what a model writes to rows, its metrics, and the likelihood of the references."""

import json
import math
import shutil

import pandas
import pytest
import sacrebleu
import torch

from coppice import data, models
from coppice.core import records
from coppice.core.errors import DataError
from coppice.models import kinds
from coppice.models.kinds import Decoding
from coppice.stages import evaluate
from tests.unit import tiny_seq2seq

KIND = kinds.named("seq2seq")
REFERENCES = [[f"w{40 + i} w8 w9", f"w8 w{50 + i} w7 w6"][: 1 + i % 2] for i in range(8)]
CAPTIONS = [{"prompt": f"w{10 + i} w{20 + 2 * i} w{30 + i}", "captions": REFERENCES[i]} for i in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_seq2seq.save(tmp_path_factory.mktemp("t5"), "flan-t5")


def prepared(folder, rows, name="captions"):
    data.write(name, {"report": rows}, folder / name, data.Origin(splits={"report": "test"}))
    return {name: str(folder / name / "dataset.json")}


def evaluated(checkpoint, datasets, output, **settings):
    how = {"answers": {"datasets": list(datasets), "new_tokens": 5} | settings, "generation": {"prompts": []}}
    request = evaluate.EvaluationRequest(
        {"model": "M", "config": None, "stage": "dense"},
        models.Source(str(checkpoint)),
        evaluate.Evaluate.model_validate(how),
        datasets,
        output,
        seed=3,
    )
    evaluate.evaluate(request)
    return records.read(output / "evaluation_results.json"), pandas.read_parquet(output / "samples/captions.parquet")


def answers_and_references(samples):
    return list(samples["answer"]), [list(found) for found in samples["references"]]


def test_a_row_keeps_its_answer_its_references_and_a_column_of_each_metric(checkpoint, tmp_path):
    record, samples = evaluated(checkpoint, prepared(tmp_path, CAPTIONS), tmp_path / "out")
    written, references = answers_and_references(samples)
    assert references == [row["captions"] for row in CAPTIONS] and len(set(written)) > 1
    assert list(samples["doc_id"]) == list(range(8)) and samples["doc_hash"].is_unique
    assert {"bleu4", "chrf", "cider", "exact_match", "answer_nll", "answer_tokens"} <= set(samples.columns)
    transposed = [[row[0] for row in references], [row[1] if len(row) > 1 else None for row in references]]
    expected = sacrebleu.corpus_chrf(written, transposed).score / 100
    chrf = record["chrf"]["captions"]
    assert chrf["value"] == pytest.approx(expected, abs=1e-9) and chrf["n"] == 8
    assert chrf["signature"].startswith("nrefs:var") and chrf["decoding"]["beams"] == 1
    assert record["warnings"] == [] and record["samples"]["captions"]


def test_the_perplexity_of_references_is_that_of_transformers_own_loss(checkpoint, tmp_path):
    record, samples = evaluated(checkpoint, prepared(tmp_path, CAPTIONS), tmp_path / "out")
    model, tokenizer = tiny_seq2seq.build("flan-t5").double(), tiny_seq2seq.tokenizer()
    losses, counts = [], []
    for row in CAPTIONS:
        losses.append(0.0)
        counts.append(0)
        for caption in row["captions"]:
            labels = tokenizer(caption, return_tensors="pt").input_ids
            with torch.no_grad():
                loss = model(input_ids=tokenizer(row["prompt"], return_tensors="pt").input_ids, labels=labels).loss
            losses[-1] += float(loss) * labels.numel()
            counts[-1] += labels.numel()
    assert list(samples["answer_nll"]) == pytest.approx(losses, rel=1e-5)
    assert list(samples["answer_tokens"]) == counts
    found = record["answer_ppl"]["captions"]
    assert found["value"] == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert found["tokens"] == sum(counts)


def test_other_metrics_of_the_same_answers_generate_nothing(checkpoint, tmp_path, monkeypatch):
    datasets = prepared(tmp_path, CAPTIONS)
    before, _ = evaluated(checkpoint, datasets, tmp_path / "out")
    monkeypatch.setattr(type(KIND), "answers", lambda *_: pytest.fail("generated again"))
    after, samples = evaluated(checkpoint, datasets, tmp_path / "out", metrics=["exact_match", "token_f1"])
    assert "bleu4" not in after and after["exact_match"] == before["exact_match"] and "token_f1" in samples.columns


def test_how_answers_are_generated_follows_the_settings(checkpoint, tmp_path):
    datasets = prepared(tmp_path, CAPTIONS)
    settings = {"sample": True, "temperature": 0.7, "top_p": 0.9, "batch_size": 3, "limit": 5, "stop": ["w5"]}
    record, samples = evaluated(checkpoint, datasets, tmp_path / "out", **settings)
    decoding = Decoding(1, True, 0.7, 0.9, 5, 3, 3, ("w5",))
    source = data.row_sources.RowSource(
        "captions", datasets["captions"], "report", "none", models.Reader(tiny_seq2seq.tokenizer()), KIND.row_kinds
    )
    expected = KIND.answers(
        models.load(models.Source(str(checkpoint))), models.Reader(tiny_seq2seq.tokenizer()), source.asked(5), decoding
    )
    assert list(samples["answer"]) == expected and len(samples) == 5
    assert record["exact_match"]["captions"]["decoding"]["seed"] == 3


def test_names_the_row_that_has_no_answer_to_compare_with(checkpoint, tmp_path):
    datasets = prepared(tmp_path, [*CAPTIONS[:2], {"prompt": "w5", "captions": []}])
    with pytest.raises(DataError, match=r"dataset captions, report row 2: has no answer to compare with"):
        evaluated(checkpoint, datasets, tmp_path / "out")


def test_names_the_columns_that_rows_need(checkpoint, tmp_path):
    datasets = prepared(tmp_path, [{"prompt": "w5", "title": "w6"}])
    with pytest.raises(DataError, match=r"datasets\.captions: its rows need the columns input and target"):
        evaluated(checkpoint, datasets, tmp_path / "out")


def test_a_checkpoints_own_way_to_generate_counts_and_is_recorded(checkpoint, tmp_path):
    datasets, copy = prepared(tmp_path, CAPTIONS), tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    before, plain = evaluated(copy, datasets, tmp_path / "out")
    found = json.loads((copy / "generation_config.json").read_text())
    own = {"repetition_penalty": 5.0, "length_penalty": 1.0, "num_beams": 4}
    (copy / "generation_config.json").write_text(json.dumps(found | own))
    after, penalized = evaluated(copy, datasets, tmp_path / "out")
    assert list(penalized["answer"]) != list(plain["answer"])
    assert "checkpoint" not in before["bleu4"]["captions"]["decoding"]
    assert after["bleu4"]["captions"]["decoding"]["checkpoint"] == {"repetition_penalty": 5.0}
