"""What the figures of the study report claim: colors follow verdicts, and too few points have no statistics."""

import pytest
from matplotlib.colors import to_rgba
from synthetic_records import SIX, Synthetic

from coppice.core import records
from coppice.render.plotting import style
from coppice.report.study_report import plots
from coppice.report.study_report import study_records as studies


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    models = dict(list(SIX.items())[:2])
    return Synthetic(tmp_path_factory.mktemp("two"), models, items=30, windows=20).build()


def _drawn(draw, study, pairs=None):
    """Return the axes that hold the data of a figure."""
    figure = style.new_figure()
    assert draw(figure, studies.read(study.results, pairs or study.pairs, study.models), {}) is None
    return figure.axes


def test_the_color_of_a_task_is_its_verdict_whatever_the_size_of_its_change(two_models):
    path = two_models.folder("finetuned", "Llama", "best_acc") / "comparison.json"
    record = records.read(path)
    tasks = record["zero_shot"]
    for name, value, verdict in (
        ("boolq", 0.4, "no clear change"),
        ("piqa", 0.01, "better"),
        ("hellaswag", 0.3, "better"),
        ("winogrande", -0.01, "worse"),
    ):
        tasks[name]["change"]["value"], tasks[name]["verdict"] = value, verdict
    records.write(path, record)
    (axes,) = _drawn(plots.task_changes, two_models, [("Llama", "best_acc")])
    axes.figure.draw_without_rendering()
    colours = [tuple(colour) for colour in axes.collections[0].get_facecolors()]
    shown = dict(zip(tasks, colours, strict=False))
    assert shown["piqa"] == shown["hellaswag"] == to_rgba(plots.VERDICT_COLOURS["better"])
    assert shown["boolq"] == to_rgba(plots.VERDICT_COLOURS["no clear change"])
    assert shown["winogrande"] == to_rgba(plots.VERDICT_COLOURS["worse"])
    texts = [text.get_text() for text in axes.texts]
    assert texts[:4] == ["+40.0", "+1.0*", "+30.0*", "-1.0*"]


def test_a_rank_correlation_needs_four_pairs(two_models):
    titles = [axes.get_title() for axes in _drawn(plots.ranks, two_models)]
    assert all("Kendall's tau" in title for title in titles)
    titles = [axes.get_title() for axes in _drawn(plots.ranks, two_models, two_models.pairs[:3])]
    assert titles and not any("tau" in title for title in titles)
