"""The page of architectures is the result of running them; a few run in every test, all of them in the slow one."""

import pytest

from tests.architectures import page, tiny, trial

# The most different ones: other names and Conv1D, no attention and no context length, and experts in one tensor
FEW = ("GPT-2", "Mamba", "Mixtral")


def lines():
    return page.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_a_row_for_every_architecture():
    table = [line.split(" |")[0].removeprefix("| ") for line in lines() if line.startswith("| ") and " (`" in line]
    assert table == [f"{title} (`{model_type}`)" for title, (model_type, _) in tiny.ARCHITECTURES.items()]


@pytest.mark.parametrize("title", FEW)
def test_the_page_says_what_happens(title, tmp_path):
    assert page.row(title, trial.run(title, tmp_path)) in lines(), "run: make architectures"


@pytest.mark.slow
def test_the_page_says_what_happens_with_every_architecture(tmp_path):
    results = {title: trial.run(title, tmp_path / str(n)) for n, title in enumerate(tiny.ARCHITECTURES)}
    assert page.written(results) == page.PAGE.read_text(encoding="utf-8"), "run: make architectures"
