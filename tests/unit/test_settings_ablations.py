"""Ablations in the configuration: the arms that an entry gives, and what is rejected before any job."""

import pytest
from test_settings import file, load, message

from coppice.study.settings import arms
from coppice.study.settings.resolved import Budget

START = {"start": {"model": "Llama", "config": "best_acc"}}
PRESETS = START | {"arms": ["light", "standard"]}


def ablated(entry, **more):
    return load({"ablations": {"mine": START | entry}}, more).ablations["mine"]


def error_of(entry):
    return message({"ablations": {"mine": entry}})


def settings_of(one, arm):
    return arms.resolved(arms.merged(one.base, one.arms[arm].changes))


def test_presets_schemes_and_overridden_presets_are_arms():
    wide = {"preset": "full", "r": 24, "alpha": 48, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    one = ablated({"arms": ["light", "balanced", {"scheme": "aggressive"}, wide, {"train": "all"}]})
    assert list(one.arms)[:3] == ["light", "balanced", "scheme-aggressive"]
    assert list(one.arms)[-1] == "all-weights" and "r" not in settings_of(one, "all-weights")
    named = settings_of(one, list(one.arms)[3])
    assert (named["r"], named["alpha"], named["dropout"]) == (24, 48, 0.1)
    assert settings_of(one, "balanced")["bias"] == "lora_only" and settings_of(one, "light")["dropout"] == 0.1
    assert one.reference == "light" and one.budget == Budget(unit="max_steps", amount=5000)


def test_a_grid_is_every_combination_and_alpha_may_follow_the_rank():
    one = ablated({"grid": {"r": [8, "16"], "learning_rate": ["1e-4", 3e-4]}, "base": {"alpha": "2r"}})
    assert next(iter(one.arms)) == "r-8.learning_rate-0.0001" and len(one.arms) == 4
    assert settings_of(one, "r-16.learning_rate-0.0003")["alpha"] == 32


def test_the_adapters_of_towers_are_varied_like_other_keys():
    towers = [{}, {"vision": {"r": 32, "alpha": 64}}, {"text": "frozen"}]
    clip = {"base": "org/clip", "kind": "dual-encoder", "evaluate": {"classification": {"datasets": ["animals"]}}}
    more = {"models": {"Clip": clip}, "datasets": {"animals": {"path": "org/animals"}}}
    more |= {"select": {"configs": {"best": {"metric": ["top1.animals", "average_acc"]}}}}
    entry = {"start": {"model": "Clip"}, "staged": [{"name": "towers", "vary": {"towers": towers}}]}
    one = ablated(entry, **more)
    names = ["towers.none", "towers.vision-r-32+alpha-64", "towers.text-frozen"]
    assert list(one.arms)[:3] == names and one.stages[0].arms == names
    assert settings_of(one, "towers.none")["towers"] == {}
    assert settings_of(one, names[1])["towers"]["vision"]["r"] == 32
    assert settings_of(one, names[2])["towers"] == {"text": "frozen"}


def test_staged_true_gives_six_stages_and_a_comparison_on_unseen_data():
    one = ablated({"staged": True})
    assert [stage.name for stage in one.stages] == ["rank", "alpha", "dropout", "bias", "targets", "variants"]
    assert [stage.after for stage in one.stages] == [None, "rank", "alpha", "dropout", "bias", "targets"]
    assert one.stages[0].arms == [f"rank.{r}" for r in (8, 16, 32, 64, 128)]
    assert settings_of(one, "rank.64")["alpha"] == 128
    assert [name for name, arm in one.arms.items() if arm.report] == ["start", "combination"]
    assert one.arms["combination"].after == "variants" and one.reference == "start"


def test_leaves_out_an_ablation_of_an_unknown_model_with_a_notice():
    study = load({"ablations": {"mine": PRESETS | {"start": {"model": "Lama"}}}})
    assert not study.ablations and "'Lama' is not in the study" in study.notices[0] and "Llama" in study.notices[0]


def test_the_shipped_ablations_do_not_break_other_studies():
    """A user who changes models, criteria, tasks or steps of the miniature study need not know its ablations."""
    for more in (
        {"select": {"configs": {"best_acc": None}}},
        {"models": {"Llama": None}},
        {"evaluate": {"zero_shot": {"tasks": ["piqa"]}}},
        {"finetune": {"warmup_steps": 500, "batch_size": 64, "data": {"val_size": 0}}},
    ):
        assert load(file("config.yaml"), more).notices or "finetune" in more


def test_null_drops_an_ablation():
    assert not load({"ablations": {"mine": PRESETS}}, {"ablations": {"mine": None}}).ablations


def test_the_miniature_study_has_an_ablation_of_presets_and_a_staged_one():
    assert list(load(file("config.yaml")).ablations) == ["presets", "order"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (START, "mine: found none of arms, grid, staged"),
        (PRESETS | {"grid": {"r": [1, 2]}}, "found arms, grid"),
        (START | {"arms": ["light", "lite"]}, "no preset or scheme 'lite'; valid are light"),
        (START | {"arms": ["light", {"preset": "light", "r": 8}]}, "'light' and 'light.r-8' are the same training"),
        (START | {"arms": ["light", "light"]}, "there is already an arm 'light'"),
        (START | {"arms": ["light"]}, "has only one arm, 'light'"),
        (START | {"arms": ["light", {"rank": 8}]}, "ablations.mine.arms[1].rank is unknown"),
        (START | {"arms": ["light", {"train": "all", "r": 8}]}, "arms[1].r: is a setting of an adapter"),
        (START | {"arms": ["light", {"alpha": "2x"}]}, "arms[1].alpha: found '2x'"),
        (START | {"arms": ["light", {"preset": "full", "scheme": "balanced"}]}, "has both a preset and a scheme"),
        (START | {"arms": ["light", {"name": "../x", "r": 4}]}, "cannot be part of a path"),
        (START | {"grid": {"rank": [4, 8]}}, "grid: 'rank' is not a key of an arm"),
        (START | {"grid": {"r": [4, "many"]}}, "grid.r: found 'many', but an integer is needed"),
        (START | {"grid": {"r": [4, 4.0]}}, "grid.r: 4 appears twice"),
        (START | {"staged": [{"name": "rank", "vary": {"r": [8]}}]}, "staged[0].vary: has only one value"),
        (START | {"staged": [{"name": "start", "vary": {"r": [8, 9]}}]}, "'start' is already taken"),
        (
            START | {"staged": [{"name": "a", "vary": {"r": [8, 9]}, "with": {"r": 3}}]},
            "with.r: this stage varies the key",
        ),
        (
            START | {"staged": True, "metrics": {"tasks": [], "perplexity": []}},
            "name a task, a text or another data set",
        ),
        (
            START | {"staged": [{"name": "a", "vary": {"towers": [{}, {"vision": {"rank": 8}}]}}]},
            "staged[0].vary.towers.vision.rank is unknown",
        ),
        (START | {"staged": True, "racing": {}}, "a staged ablation cannot race"),
        (PRESETS | {"budget": {"max_steps": 50}}, "arm 'light' warms up for 100 steps"),
        (PRESETS | {"budget": {"max_steps": 500, "tokens": 1e6}}, "keep one unit"),
        (PRESETS | {"budget": {"tokens": 100}}, "arm 'light' spends more than that in its first step of 64"),
        (START | {"grid": {"batch_size": [32, 64]}}, "with a budget of steps"),
        (PRESETS | {"start": {}}, "start: name either a model of the study or a checkpoint"),
        (PRESETS | {"start": {"model": "Llama", "prompt": "chat"}}, "start.prompt: needs a checkpoint"),
        (PRESETS | {"metrics": {"tasks": ["boolqq"]}}, "did you mean 'boolq'?"),
        (PRESETS | {"choose_by": {"metric": "accuracy"}}, "choose_by.metric: found 'accuracy'; valid are"),
        (PRESETS | {"reference": "full"}, "there is no arm 'full' to compare with; valid are light, standard"),
        (PRESETS | {"data": {"val_size": 0}}, "must be above 0"),
        (PRESETS | {"base": {"train": "all"}}, "arm 'light' sets preset, but trains all weights"),
        (START | {"arms": ["light", {"alpha": 0}]}, "arms[1].alpha: found '0'"),
        (START | {"arms": ["light", {"alpha": "0r"}]}, "arms[1].alpha: found '0r'"),
        (PRESETS | {"data": {"validation": "alpaca"}}, "data.validation: 'alpaca' is also trained on"),
        (PRESETS | {"data": {"dataset": "alpaka"}}, "ablations.mine.data.dataset: there is no data set 'alpaka'"),
        (PRESETS | {"budget": {"max_steps": 200}, "racing": {"rungs": 9}}, "comes before the first of 200 steps"),
    ],
)
def test_rejects_an_ablation_that_cannot_be_compared(entry, expected):
    assert expected in error_of(entry)
