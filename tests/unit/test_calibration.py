"""Calibration windows: contiguous parts of the text, from every place, and within one row if rows are documents."""

from collections import Counter

import pytest
import torch
from test_settings import load

from coppice import data, models
from coppice.core.errors import DataError
from coppice.data import datasets as prepared
from coppice.models import kinds
from coppice.stages.prune.candidates import calibration
from coppice.study.settings import registry


@pytest.fixture
def drawn(tmp_path, tiny_tokenizer):
    """Return `draw(rows, windows, ...)`, which returns windows of a data set with these rows: [samples, length]."""

    def draw(rows, windows="running", samples=50, length=8, context=256, seed=0):
        data.write("mine", {"train": [{"text": row} for row in rows]}, tmp_path)
        asked = {"record": tmp_path / "dataset.json", "dataset": "mine", "samples": samples, "length": length}
        found, fingerprint = calibration.batches(
            kinds.named("causal-lm"), models.Reader(tiny_tokenizer), asked | {"windows": windows}, context, seed
        )
        assert fingerprint == prepared.fingerprint(tmp_path / "dataset.json", "train")
        return torch.cat(found)

    return draw


def text(numbers):
    return " ".join(f"w{number}" for number in numbers)


@pytest.mark.parametrize("words", [1, 5, 30, 120])
def test_running_windows_are_contiguous_parts_of_the_joined_rows(drawn, words):
    # Each token's successor is known, so a window with text of two places would show.
    numbers = [40 + i % 80 for i in range(600)]
    rows = [text(numbers[i : i + words]) for i in range(0, 600, words)]
    found = drawn(rows)
    assert found.shape == (50, 8)
    assert ((found[:, 1:] - found[:, :-1]) % 80 == 1).all()
    assert len(set(found[:, 0].tolist())) > 20
    assert not torch.equal(found, drawn(rows, seed=1)) and torch.equal(found, drawn(rows))


def test_running_windows_begin_at_every_place_alike_however_long_the_rows_are(drawn):
    numbers = list(range(40, 120))
    rows = [text(numbers[:40]), *(text([number]) for number in numbers[40:60]), "", text(numbers[60:])]
    starts = Counter(drawn(rows, samples=800, length=2)[:, 0].tolist())
    assert set(starts) == set(numbers[:-1]) and max(starts.values()) < 40
    # by their characters, the first row is 0.46 of the text, and the short ones are 0.27
    assert 0.4 < sum(starts[number] for number in numbers[:40]) / 800 < 0.52


def test_windows_at_the_end_of_the_text_are_its_last_tokens(drawn):
    rows = [text(range(40, 46)), text(range(46, 50))]
    assert {tuple(window) for window in drawn(rows, length=10).tolist()} == {tuple(range(40, 50))}


def test_windows_within_rows_never_join_two(drawn):
    rows = [text([start] * 12) for start in range(40, 80)] + [text([100] * 3)] * 40
    found = drawn(rows, "within-rows", samples=30)
    assert found.shape == (30, 8) and all(len(set(window)) == 1 for window in found.tolist())
    assert len(set(found[:, 0].tolist())) == 30  # each row serves once
    assert len(drawn(rows, "within-rows", samples=100)) == 40  # as many as there are


def test_windows_are_no_longer_than_the_context(drawn):
    assert drawn([text(range(40, 100))], length=64, context=16).shape[1] == 16


@pytest.mark.parametrize("windows", ["running", "within-rows"])
def test_rejects_text_that_is_too_short(drawn, windows):
    with pytest.raises(DataError, match="fewer than 64 tokens"):
        drawn([text(range(40, 50))] * 3, windows, length=64)


def test_windows_suit_the_data_set_unless_they_are_given():
    def chosen(**given):
        return load({"candidates": {"calibration": given}}).calibration_of("Llama").windows

    assert chosen(dataset="wikitext2") == chosen(dataset="bookcorpus") == "running"
    assert chosen(dataset="c4") == chosen(dataset="ptb", windows="within-rows") == "within-rows"
    assert set(registry.DOCUMENTS) < set(registry.DATASETS)


def test_a_split_with_a_slash_is_a_file_of_the_repository(monkeypatch, tmp_path):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return prepared_rows

    import datasets

    prepared_rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = registry.completed("c4", {}) | {"commit": "abc", "uses": ["text"]}
    data.prepare("c4", entry, tmp_path, needs_selection=False)
    files = [options["data_files"]["rows"] for _, options in asked]
    assert files == ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"]
    assert all(args == ("allenai/c4", None) for args, _ in asked)
    assert all((options["split"], options["revision"]) == ("rows", "abc") for _, options in asked)
