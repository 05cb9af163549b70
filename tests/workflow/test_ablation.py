"""Ablations run for real: a staged ablation that is killed between its stages, and a race that trains all weights."""

import json

import pytest

from tests.study.checkout import SMALL
from tests.study.running import Running

pytestmark = pytest.mark.slow
START = {"checkpoint": "./resources/miniature/models/mistral/checkpoint", "prompt": "none"}
COMMON = {
    "start": START,
    "data": {"val_size": 20},
    "base": {"learning_rate": 0.004, "batch_size": 8, "warmup_steps": 1},
    "metrics": {"tasks": ["piqa"], "perplexity": [], "limit": 10},
}
STAGED = COMMON | {
    "budget": {"max_steps": 4},
    "staged": [
        {"name": "rank", "vary": {"r": [2, 8]}, "with": {"alpha": "2r"}},
        {"name": "alpha", "vary": {"alpha": ["r", "2r"]}},
    ],
}
RACE = COMMON | {
    "budget": {"max_steps": 8},
    "eval_steps": 2,
    "arms": [{"r": 2}, {"r": 8}, {"name": "whole", "train": "all", "learning_rate": 0.001}],
    "racing": {"rungs": 1, "eta": 2},
}
WINNERS = ("winner-rank.json", "winner-alpha.json")
REPORT = "{}/ablation/{}/ablation_report.html"


def settings(results):
    mine = {"staged": STAGED, "race": RACE, "presets": None, "order": None}
    return SMALL | {"ablations": json.dumps(mine), "results": results}


def content(folder, *names):
    return [json.loads((folder / name).read_text()) for name in names]


@pytest.fixture(scope="module")
def undisturbed(study):
    study.run("--cores", "2", REPORT.format("whole", "staged"), config=settings("whole"))
    return study.folder / "whole/ablation/staged"


def test_a_staged_ablation_evaluates_its_combination_on_unseen_data(undisturbed):
    rank, alpha = content(undisturbed, *WINNERS)
    (combination,) = content(undisturbed, "combination/seed-42/arm.json")
    assert combination["settings"] == alpha["settings"] and alpha["settings"]["r"] == rank["settings"]["r"]
    assert combination["reused_from"] in alpha["values"], "its stage has already trained the winner"
    assert (undisturbed / "combination/seed-42/report/evaluation_results.json").is_file()
    assert not (undisturbed / "rank.2/seed-42/report").exists()
    page = (undisturbed / "ablation_report.html").read_text()
    assert "on data that no stage has seen" in page or "keep it" in page
    assert "Not comparable" not in page


def test_a_staged_ablation_killed_between_stages_ends_with_the_same_winner(study, undisturbed):
    folder = study.folder / "killed/ablation/staged"
    with Running(study, REPORT.format("killed", "staged"), config=settings("killed"), cores=2) as run:
        run.wait_until(lambda: (folder / WINNERS[0]).exists())
        run.kill()
    before = (folder / "rank.2/seed-42/arm.json").stat().st_mtime_ns
    assert not (folder / WINNERS[1]).exists()
    study.run("--unlock", config=settings("killed"))
    study.run("--cores", "2", REPORT.format("killed", "staged"), config=settings("killed"))
    assert (folder / "rank.2/seed-42/arm.json").stat().st_mtime_ns == before, "a finished arm must not be trained again"
    for ended, again in zip(content(undisturbed, *WINNERS), content(folder, *WINNERS), strict=True):
        assert {key: ended[key] for key in ("winner", "settings", "values")} == {
            key: again[key] for key in ("winner", "settings", "values")
        }


def test_a_race_stops_the_worse_arms_and_reports_them(study):
    study.run("--cores", "2", REPORT.format("raced", "race"), config=settings("raced"))
    folder = study.folder / "raced/ablation/race"
    (rung,) = content(folder, "rung-1.json")
    arms = {path.parts[-3]: json.loads(path.read_text()) for path in folder.glob("*/seed-42/arm.json")}
    assert len(rung["survivors"]) == 2 and set(arms) == {"r-2", "r-8", "whole"}
    for name, arm in arms.items():
        assert ("raced_out" in arm) == (name not in rung["survivors"])
        assert "raced_out" in arm or (arm["steps"], arm["trainable_parameters"]) == (8, arm["predicted_parameters"])
    page = (folder / "ablation_report.html").read_text()
    assert "The race saved 17 %" in page and "risk of a race" in page
