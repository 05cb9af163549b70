"""Latencies: measured in turns, one figure for an architecture, and shown only where they differ by more than noise."""

import types

import pytest
from safetensors.torch import load_file, save_file
from synthetic_records import SIX, Synthetic

from coppice import models
from coppice.core import records
from coppice.models import timing
from coppice.report.study_report import plots, sections, speeds
from coppice.report.study_report import study_records as studies
from coppice.stages.evaluate import latency

SETTINGS = types.SimpleNamespace(batch_sizes=[1, 2], prompt_tokens=6, new_tokens=2)


@pytest.fixture
def folders(tiny_checkpoint, tmp_path):
    """Return (dense, candidates): one without structure, which has the dense shapes, and one with a layer less."""
    dense = tiny_checkpoint("llama")
    sparse = tiny_checkpoint("llama", seed=1)
    weights = load_file(f"{sparse}/model.safetensors")
    save_file({name: tensor * (tensor > 0) for name, tensor in weights.items()}, f"{sparse}/model.safetensors")
    return dense, {"sparse": sparse, "depth": tiny_checkpoint("llama", num_hidden_layers=3)}


def _measured(folders, tmp_path):
    dense, candidates = folders
    request = latency.LatencyRequest(models.Source(str(dense)), candidates, SETTINGS)
    latency.measure({"model": "M"}, request, tmp_path / "latency.json")
    return records.read(tmp_path / "latency.json")


def test_weights_of_one_architecture_share_their_figures(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 2)
    record = _measured(folders, tmp_path)
    assert record["candidates"]["sparse"] == record["dense"] != record["candidates"]["depth"]
    assert set(record["architectures"]) == {record["dense"], record["candidates"]["depth"]}
    for figures in record["architectures"].values():
        assert [one["batch_size"] for one in figures] == [1, 2]
        for one in figures:
            for key in ("prompt_seconds", "token_seconds"):
                assert len(one[key]["rounds"]) == 2 and 0 < one[key]["low"] <= one[key]["value"] <= one[key]["high"]


def test_models_take_turns_so_that_a_load_hits_all_of_them(folders, tmp_path, monkeypatch):
    """The machine is three times slower in the second half. Timed one after the other, the models would differ so."""
    turns = []

    def timed(model, batch, prompt, new):
        turns.append(model.config.num_hidden_layers)
        slow = 3 if len(turns) > 2 * latency.ROUNDS else 1
        return slow * 0.1, slow * 0.01 * model.config.num_hidden_layers

    monkeypatch.setattr(timing, "measure", timed)
    record = _measured(folders, tmp_path)
    assert turns[:8] == [4, 4, 3, 3, 3, 3, 4, 4]
    four, three = (record["architectures"][name][0] for name in (record["dense"], record["candidates"]["depth"]))
    assert speeds.clear_ratio(four["token_seconds"], three["token_seconds"]) == pytest.approx((3 / 4,) * 3)
    assert speeds.clear_ratio(four["prompt_seconds"], three["prompt_seconds"]) is None


def _study(tmp_path, dense, pruned, **record):
    study = Synthetic(tmp_path, {"Llama": SIX["Llama"]}, configs=("best_acc",), items=20, windows=20).build()
    figure = {"batch_size": 1, "prompt_seconds": _time(90, 100, 110)}
    written = {"dense": "a", "candidates": {"candidate-0": "b"}} | record
    written["architectures"] = {"a": [figure | {"token_seconds": dense}], "b": [figure | {"token_seconds": pruned}]}
    records.write(tmp_path / "latency/Llama/latency.json", written)
    path = study.folder("finetuned", "Llama", "best_acc") / "evaluation_results.json"
    cost = {"macs_per_token": {"linear": 1}, "nonzero_parameters": None, "parameters": 9, "weight_bytes": 9}
    records.write(path, records.read(path) | {"cost": cost | {"adapter_merged": True}})
    return studies.read(study.results, study.pairs, study.models)


def _time(*milliseconds):
    values = [value / 1000 for value in milliseconds]
    return {"value": sorted(values)[1], "low": min(values), "high": max(values), "rounds": values}


def _shown(study):
    (pair,) = study.pairs
    return dict(sections._cost(pair)).get("latency at batch size 1"), speeds.of_pair(pair)


def test_the_report_shows_a_clear_difference_with_its_spread(tmp_path):
    text, points = _shown(_study(tmp_path, _time(12, 12.5, 13), _time(9, 9.4, 9.6)))
    assert "12.5 [12.0, 13.0] ms per new token for the dense model, 0.75 times [0.74, 0.75] that for the pruned" in text
    assert "no clear difference in ms to read the prompt" in text
    assert points == pytest.approx({"dense": 12.5, "pruned": 12.5 * 0.75, "finetuned": 12.5 * 0.75}, rel=0.01)


def test_the_report_shows_no_difference_smaller_than_the_spread(tmp_path):
    text, points = _shown(_study(tmp_path, _time(12, 12.5, 13), _time(8, 10, 14)))
    assert text.startswith("no clear difference in ms per new token") and points is None


def test_a_candidate_of_the_dense_shapes_has_the_dense_figure(tmp_path):
    study = _study(tmp_path, _time(12, 12.5, 13), _time(9, 9.4, 9.6), candidates={"candidate-0": "a"})
    text, points = _shown(study)
    assert text == "12.5 [12.0, 13.0] ms per new token; the pruned model has the dense shapes" and points is None


def test_results_without_latencies_are_reported(tmp_path):
    study = Synthetic(tmp_path, {"Llama": SIX["Llama"]}, configs=("best_acc",), items=20, windows=20).build()
    found = studies.read(study.results, study.pairs, study.models)
    assert _shown(found) == (None, None) and found.absent == [] and found.failed == []
    assert plots._latency(found.pairs[0], "dense") is None
