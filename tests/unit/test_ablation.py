"""Arms of an ablation: trained under equal conditions, counted before training, compared in pairs, and reported."""

import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import SETTINGS, instruction_rows, train
from test_finetuning import dataset as dataset

from coppice import data, models
from coppice.ablation import arm as arms_of
from coppice.ablation import measuring, races, reading, recommendation, report, stages
from coppice.core import records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.stages import recover
from coppice.stages.recover import training
from coppice.stages.recover.engine import duration
from coppice.stages.recover.full import AllWeights
from coppice.stages.recover.lora import Lora
from coppice.stats import metrics
from coppice.study.settings import arms, lora_presets
from coppice.study.settings.resolved import ArmComparison, Budget, StudyArm
from coppice.study.settings.sections.ablation import ChooseBy
from coppice.study.settings.sections.evaluate import Evaluate
from coppice.study.settings.sections.finetune import Finetune

STEPS = Budget(unit="max_steps", amount=6)
LOSS = ChooseBy(metric="validation_loss", mode="min")
FINETUNE = Finetune.model_validate(SETTINGS)
# captioner names layers of T5, which these models do not have
EVERY = [{"preset": name} for name in lora_presets.PRESETS if name != "captioner"]
EVERY += [{"scheme": name} for name in lora_presets.SCHEMES]


def section(arm):
    whole = arms.section(FINETUNE, arms.resolved(arms.merged(arms.flat(FINETUNE), arm)))
    return recover.TrainingSettings.model_validate(whole)


def count_trained(folder, settings):
    """Return the number of parameters that really get a gradient."""
    source = models.Source(str(folder))
    model = Lora().prepare(models.load(source, train=True), models.kind_of(source), source, settings, [])
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("arm", EVERY, ids=arms.name_of)
def test_predicts_the_number_of_trained_parameters(tiny_checkpoint, architecture, arm):
    folder = tiny_checkpoint(architecture)
    for more in ({}, {"bias": "all", "use_dora": True}):
        settings = section(arm | more)
        assert recover.trainable_parameters(models.Source(str(folder)), settings) == count_trained(folder, settings)


def test_predicts_the_trained_parameters_of_layers_with_other_names(tmp_path):
    """OPT names its modules as encoders do, and all of them have biases."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"vocab_size": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    OPTForCausalLM(OPTConfig(**sizes, **more)).save_pretrained(tmp_path)
    settings = section({"r": 4, "target_modules": ["out_proj", "fc1", "fc2"], "bias": "lora_only"})
    predicted = recover.trainable_parameters(models.Source(str(tmp_path)), settings)
    assert predicted == 2 * (4 * (32 + 32) + 32 + 4 * (32 + 48) * 2 + 48 + 32) == count_trained(tmp_path, settings)


def test_training_all_weights_trains_each_and_writes_a_complete_checkpoint(tiny_checkpoint, dataset, tmp_path):
    folder = tiny_checkpoint("qwen2", tie_word_embeddings=True)
    settings = section({"train": "all", "learning_rate": 1e-3})
    record = train(folder, dataset, tmp_path / "out", settings)
    source = models.Source(str(folder))
    assert record["trainable_parameters"] == recover.trainable_parameters(source, settings)
    assert record["trainable_percent"] == 100 and record["validation_loss"] < record["first_validation_loss"]
    after = models.load(models.Source(str(tmp_path / "out" / recover.MODEL))).state_dict()
    before = models.load(source).state_dict()
    assert all(not after[name].equal(before[name]) for name in before if "norm" in name or "q_proj" in name)


def test_training_all_weights_resumes_from_a_checkpoint_to_the_same_result(tiny_checkpoint, dataset, tmp_path):
    folder, settings = tiny_checkpoint("llama"), section({"train": "all", "learning_rate": 1e-3})
    train(folder, dataset, tmp_path / "whole", settings)
    source, identity = models.Source(str(folder)), {"model": "M", "config": "c"}
    stopped = {"prompt": "none", "output": tmp_path / "out", "seed": 3}
    recover.finetune(recover.TrainingRequest(identity, source, {"mine": dataset}, settings, stop_share=0.5, **stopped))
    assert records.read(tmp_path / "out" / recover.RUNG_LOSS_FILE)["step"] == 4  # validation runs every second step
    assert not (tmp_path / "out/finetuning_config.json").exists()
    train(folder, dataset, tmp_path / "out", settings)
    ends = [load_file(tmp_path / name / recover.MODEL / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_rejects_a_model_that_does_not_fit_the_device_before_training(monkeypatch):
    monkeypatch.setattr(models, "device_memory", lambda: 2**30)
    with pytest.raises(recover.DoesNotFit, match="takes 104 GiB"):
        AllWeights().check_room(7 * 10**9)


def test_a_token_budget_ends_with_the_step_that_reaches_it():
    wanted = Budget(unit="tokens", amount=100)
    assert duration.steps(wanted, [10] * 8, 2, 4000, seed=0) == 5  # 20 tokens a step, over two epochs
    assert duration.steps(Budget(unit="tokens", amount=101), [10] * 8, 2, 4000, seed=0) == 6


def test_a_flop_budget_trains_all_weights_for_fewer_tokens():
    wanted, rows = Budget(unit="flops", amount=1200 * 1000), [10] * 8
    adapter, everything = (
        recover.recovery_of(recover.TrainingSettings(train=name)).operations(1000) for name in ("lora", "all")
    )
    assert duration.steps(wanted, rows, 2, adapter, seed=0) == 15
    assert duration.steps(wanted, rows, 2, everything, seed=0) == 10


def test_rejects_a_budget_smaller_than_the_first_step():
    with pytest.raises(SettingsError, match=r"budget\.tokens: 19 .*20 tokens.*batch_size"):
        duration.steps(Budget(unit="tokens", amount=19), [10] * 8, 2, 4000, seed=0)


SHARED = {"base": arms.flat(FINETUNE), "finetune": FINETUNE, "evaluate": Evaluate(), "evaluation_datasets": {}}


def run_arm(folder, dataset, output, name="r-4", changes=None, after=None, seed=3, **more):
    """Train an arm on the tiny model and return the path of its record."""
    rows = {"mine": dataset}
    plan = arms_of.ArmPlan(budget=STEPS, eval_steps=2, choose_by=LOSS, training_datasets=rows, **SHARED)
    member = StudyArm(changes=changes or {}, report=False)
    start = arms_of.Start("tiny", models.Source(str(folder)), "none")
    path = output / name / f"seed-{seed}" / "arm.json"
    identity = {"ablation": "mine", "arm": name}
    arms_of.train(arms_of.ArmRequest(identity, start, plan, member, seed, path, after=after, **more))
    return path


@pytest.fixture(scope="module")
def trained_arms(tiny_checkpoint, tmp_path_factory):
    """Train two arms; return (folder of the ablation, its checkpoint, its data)."""
    folder = tmp_path_factory.mktemp("ablation")
    data.write("mine", {"train": instruction_rows()}, folder / "data")
    start, rows = tiny_checkpoint(), folder / "data/dataset.json"
    for name, r in (("r-4", 4), ("r-8", 8)):
        run_arm(start, rows, folder, name, {"r": r})
    return folder, start, rows


@pytest.fixture
def two_arms(trained_arms, tmp_path):
    """Return the paths of copies of their records, which a test may change."""
    for name in ("r-4", "r-8"):
        shutil.copytree(trained_arms[0] / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*", "best"))
    return [tmp_path / name / "seed-3/arm.json" for name in ("r-4", "r-8")]


def change_record(path, **changes):
    content = records.read(path)
    for dotted, value in changes.items():
        *above, key = dotted.split("__")
        place = content
        for part in above:
            place = place[part]
        place[key] = value
    records.write(path, content)
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 7}, "trained for 7 steps, but the budget is 6"),
        ({"tokens_seen": 1}, "trained for 1 tokens"),
        ({"provenance__fingerprints__weights": "x"}, "different starting checkpoint"),
        ({"provenance__fingerprints__datasets": {"mine": "x"}}, "different training data"),
        ({"data": {"val_size": 9}}, "settings of finetune.data"),
        ({"seed": 4}, "other seeds"),
    ],
)
def test_names_how_an_arm_was_trained_differently(two_arms, changes, expected):
    first, second = two_arms
    change_record(second, **changes)
    found = [reading.arm(name, [path]) for name, path in (("r-4", first), ("r-8", second))]
    assert not reading.unequal(found[:1], STEPS)
    assert expected in reading.unequal(found, STEPS)["r-8"][0]
    with pytest.raises(CoppiceError, match=r"cannot be compared.*arm\.json"):
        reading.check_equal("mine", found, STEPS)


def test_reports_an_arm_that_was_trained_differently(two_arms, tmp_path):
    first, second = two_arms
    change_record(second, steps=7)
    ablation = ArmComparison(budget=STEPS, choose_by=LOSS, reference="r-4", stages=[])
    report.write("mine", ablation, "tiny", {"r-4": [first], "r-8": [second]}, [], None, tmp_path)
    page = (tmp_path / "ablation_report.html").read_text()
    assert (
        "Not comparable" in page and "trained for 7 steps, but the budget is 6" in page and "No recommendation" in page
    )
    assert list(load_csv(tmp_path)["compared"]) == [True, False]


def test_names_the_arm_that_differs_from_most_at_any_position(tmp_path):
    paths = {name: synthetic(tmp_path, name, 1.0) for name in "abc"}
    change_record(paths["a"][1], steps=7)
    assert list(reading.unequal([reading.arm(*one) for one in paths.items()], STEPS)) == ["a"]


def load_csv(folder):
    import pandas

    return pandas.read_csv(folder / "ablation.csv")


def test_reuses_an_arm_that_an_earlier_stage_trained(trained_arms, monkeypatch):
    folder, start, rows = trained_arms
    paths = {name: [folder / name / "seed-3/arm.json"] for name in ("r-4", "r-8")}
    stages.decide("mine", "rank", paths, LOSS, STEPS, folder / "winner-rank.json")
    winner = records.read(folder / "winner-rank.json")
    monkeypatch.setattr(training, "_run", lambda *arguments: pytest.fail("it was trained again"))
    again = run_arm(start, rows, folder, "alpha.8", {"alpha": 8}, folder / "winner-rank.json")
    assert records.read(again)["reused_from"] == winner["winner"]
    assert records.read(again)["validation_loss"] == winner["values"][winner["winner"]]


LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "bias": "none"}
LORA |= {"use_rslora": False, "use_dora": False, "init": "default", "learning_rate": 1e-3, "train": "lora"}


def synthetic(folder, name, loss, settings=None, seeds=(1, 2, 3), more=None, flat=None):
    """Write the records of an arm with mean validation loss `loss` and noise in each example; return their paths."""
    paths = []
    for seed in seeds:
        own = numpy.random.default_rng([seed, *name.encode()]).normal(0, 0.02, 200)
        losses = loss + own - own.mean()
        place = folder / name / f"seed-{seed}"
        prints = {"weights": "w", "tokenizer": "t", "datasets": {"mine": "d"}}
        content = {
            "ablation": "mine",
            "arm": name,
            "seed": seed,
            "stage": None,
            "settings": settings or {"train": "lora"},
            "flat": flat,
        }
        content |= {"measured": [], "data": {}, "prompt": "none", "start": "tiny", "reused_from": None}
        content |= {"validation_loss": loss, "steps": 6, "tokens_seen": 600, "seconds": 1.0, "operations": 4}
        content |= {
            "train_rows": 9,
            "validation_rows": 200,
            "history": [{"step": 6, "eval_loss": loss}],
            "warnings": [],
        }
        content |= {"trainable_parameters": 100, "trainable_percent": 1.0, "stored_bytes": 400, "all_parameters": 10000}
        content |= {"tokens_per_second": 600.0, "peak_memory_bytes": {"host": 1}, "train_loss": loss}
        content |= {"provenance": {"fingerprints": prints, "device": "cpu", "versions": {}}} | (more or {})
        records.write(place / "arm.json", content)
        records.write(
            place / "validation_losses.json",
            {"rows": [f"{seed}.{i}" for i in range(200)], "losses": list(losses), "tokens": [1] * 200},
        )
        paths.append(place / "arm.json")
    return paths


def test_a_staged_ablation_finds_the_planted_best(tmp_path):
    """The synthetic loss of every rank and alpha is given; each stage must start from the best of the stage before."""

    def planted(settings):
        return 1 + abs(settings["r"] - 16) / 100 + abs(settings["alpha"] / settings["r"] - 4) / 50

    base, after, chosen = arms.flat(FINETUNE), None, []
    for stage, values in (("rank", [{"r": r, "alpha": "2r"} for r in (8, 16, 32)]), ("alpha", ["r", "2r", "4r"])):
        paths = {}
        for value in values:
            changes = value if isinstance(value, dict) else {"alpha": value}
            flat = arms_of.flat_of(base, changes, after)
            settings = arms.resolved(flat)
            name = f"{stage}.{settings['r']}.{settings['alpha']}"
            paths[name] = synthetic(tmp_path, name, planted(settings), settings, flat=flat)
        output = tmp_path / f"winner-{stage}.json"
        stages.decide("mine", stage, paths, LOSS, STEPS, output, after)
        after = output
        chosen.append(records.read(output))
    assert [one["winner"] for one in chosen] == ["rank.16.32", "alpha.16.64"]
    assert (chosen[-1]["settings"]["r"], chosen[-1]["settings"]["alpha"]) == (16, 64)
    assert chosen[-1]["runner_up"]["verdict"] == "worse" and len(chosen[-1]["trained"]) == 6


def synthetic_arms(folder, losses, sizes):
    return [
        reading.arm(name, synthetic(folder, name, loss, more={"trainable_parameters": size}))
        for (name, loss), size in zip(losses.items(), sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("losses", "sizes", "verdict", "expected"),
    [
        (
            {"a": 1.0, "b": 1.0005, "c": 1.0003},
            (300, 100, 200),
            "not clear",
            "Take the cheapest, b, which trains 100 parameters",
        ),
        ({"a": 1.0, "b": 1.2, "c": 1.3}, (300, 100, 200), "clear", "Take a: it is the best (validation loss 1.0000)"),
        ({"a": 1.0, "b": 1.3, "c": 1.0005}, (300, 100, 200), "clear", "The cheapest arm within noise of it is c"),
    ],
)
def test_recommends_the_best_arm_or_the_cheapest_within_noise(tmp_path, losses, sizes, verdict, expected):
    arms_found = synthetic_arms(tmp_path, losses, sizes)
    answer = recommendation.recommend(arms_found, LOSS, arms_found[0])
    assert answer["verdict"] == verdict and expected in answer["sentence"]


def test_lists_the_arms_from_best_to_worst_in_the_chosen_direction(tmp_path):
    arms_found = synthetic_arms(tmp_path, {"a": 1.0, "b": 1.2, "c": 1.3}, (100, 100, 100))
    highest = recommendation.recommend(arms_found, ChooseBy(metric="validation_loss", mode="max"), arms_found[2])
    assert [line.split()[0] for line in highest["evidence"][:2]] == ["b", "a"]


def test_variation_between_seeds_is_noise(tmp_path):
    """By their items alone, arms that vary between seeds as much as they differ would seem to differ clearly."""
    first = [synthetic(tmp_path, "a", loss, seeds=(seed,))[0] for seed, loss in ((1, 1.0), (2, 1.1), (3, 1.2))]
    second = [synthetic(tmp_path, "b", loss, seeds=(seed,))[0] for seed, loss in ((1, 1.05), (2, 1.11), (3, 1.35))]
    both = [reading.arm("a", first), reading.arm("b", second)]
    found = measuring.differences(both, both[0], metrics.LOSS, "report")["b"]
    assert found["value"] == pytest.approx(0.07) and found["verdict"] == "no clear change"
    assert found["interval"][0] < 0 < found["interval"][1]


def test_counts_rows_that_several_seeds_hold_out_once(tmp_path):
    paths = {name: synthetic(tmp_path, name, loss, seeds=(1, 2)) for name, loss in (("a", 1.0), ("b", 1.001))}
    apart = measuring.joint([reading.arm(*one) for one in paths.items()], metrics.LOSS, "report")
    for path in [path for several in paths.values() for path in several]:
        losses = path.parent / "validation_losses.json"
        records.write(losses, records.read(losses) | {"rows": [str(i) for i in range(200)]})
    shared = measuring.joint([reading.arm(*one) for one in paths.items()], metrics.LOSS, "report")
    assert shared.values == pytest.approx(apart.values)
    assert shared.resampled({"a": 1})["count"] == 200
    assert shared.error({"a": 1})[0] == pytest.approx(apart.error({"a": 1})[0], rel=0.25)  # 200 means of two losses


def test_reports_an_ablation_in_which_no_arm_was_trained(tmp_path):
    whole = {"ablation": "mine", "arm": "all", "seed": 1, "stage": None, "start": "tiny", "unfit": "the loss is nan"}
    records.write(tmp_path / "all/arm.json", whole | {"settings": {"train": "all", "learning_rate": 1.0}})
    ablation = ArmComparison(budget=STEPS, choose_by=LOSS, reference="all", stages=[])
    report.write("mine", ablation, "tiny", {"all": [tmp_path / "all/arm.json"]}, [], None, tmp_path)
    page = (tmp_path / "ablation_report.html").read_text()
    assert "not trained: the loss is nan" in page and "No recommendation" in page


def test_an_arm_that_diverges_is_recorded_and_does_not_fail(tiny_checkpoint, dataset, tmp_path, monkeypatch):
    def diverge(*arguments, **options):
        raise recover.Diverged("finetune: the loss is nan at step 3")

    monkeypatch.setattr(recover, "finetune", diverge)
    path = run_arm(tiny_checkpoint(), dataset, tmp_path)
    found = reading.arm("r-4", [path])
    assert not found.trained and "the loss is nan at step 3; to try it again, delete" in found.unfit


def test_a_difference_on_which_seeds_disagree_is_not_clear(tmp_path):
    first = synthetic(tmp_path, "a", 1.0)
    second = [synthetic(tmp_path, "b", loss, seeds=(seed,))[0] for seed, loss in ((1, 1.2), (2, 1.2), (3, 0.99))]
    both = [reading.arm("a", first), reading.arm("b", second)]
    assert recommendation.recommend(both, LOSS, both[0])["verdict"] == "not clear"


def test_a_race_keeps_the_better_half_and_records_how_far_each_arm_got(tmp_path):
    def rung(number, losses):
        for name, loss in losses.items():
            records.write(
                tmp_path / f"{name}-{number}.json", {"share": number / 2, "step": number, "validation_loss": loss}
            )

    rung(1, {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.5})
    paths = {name: [tmp_path / f"{name}-1.json"] for name in "abcd"}
    races.cut("mine", paths, 2, tmp_path / "rung-1.json")
    assert records.read(tmp_path / "rung-1.json")["survivors"] == ["b", "d"]
    rung(2, {"b": 0.9, "d": 0.8})
    paths = {name: [tmp_path / f"{name}-2.json"] for name in "abcd"}
    races.cut("mine", paths, 2, tmp_path / "rung-2.json", tmp_path / "rung-1.json")
    last = records.read(tmp_path / "rung-2.json")
    assert last["survivors"] == ["d"] and [rung["step"] for rung in last["reached"]["b"]] == [1, 2]
    assert [rung["step"] for rung in last["reached"]["a"]] == [1]


def test_does_not_train_an_arm_that_a_race_stopped(tiny_checkpoint, dataset, tmp_path):
    folder = tiny_checkpoint()
    reached = {"r-4": [], "r-8": [{"share": 0.5, "step": 4, "validation_loss": 2.0}]}
    records.write(tmp_path / "rung-1.json", {"survivors": ["r-4"], "reached": reached})
    path = run_arm(folder, dataset, tmp_path, "r-8", {"r": 8}, survivors=tmp_path / "rung-1.json")
    arm = reading.arm("r-8", [path])
    assert not arm.trained and arm.raced_out["step"] == 4 and not (path.parent / "finetuning_config.json").exists()


def test_the_report_notes_the_warnings_of_an_arm(tmp_path):
    warned = {"warnings": ["training computed the examples one by one, not as a prefix tree: a reason"]}
    paths = {"a": synthetic(tmp_path, "a", 1.0, LORA, more=warned), "b": synthetic(tmp_path, "b", 1.2, LORA)}
    ablation = ArmComparison(budget=STEPS, choose_by=LOSS, reference="b", stages=[])
    report.write("mine", ablation, "tiny", paths, [], None, tmp_path)
    for page in ("ablation_report.html", "ablation_report.md"):
        assert "not as a prefix tree: a reason" in (tmp_path / page).read_text()


def test_the_report_says_how_the_towers_of_an_arm_differ(tmp_path):
    vision = {"r": 32, "alpha": 64, "learning_rate": None, "target_modules": ["q_proj", "v_proj"]}
    own = LORA | {"towers": {"vision": vision, "text": "frozen"}}
    paths = {"a": synthetic(tmp_path, "a", 1.0, own), "b": synthetic(tmp_path, "b", 1.2, LORA)}
    ablation = ArmComparison(budget=STEPS, choose_by=LOSS, reference="b", stages=[])
    report.write("mine", ablation, "tiny", paths, [], None, tmp_path)
    page = (tmp_path / "ablation_report.md").read_text()
    assert "vision with r 32, alpha 64, target modules q_proj and v_proj, text frozen" in page


def test_the_report_escapes_names_and_lists_arms_that_did_not_fit(tmp_path):
    names = {"<b>a</b>": 1.0, "b": 1.2}
    paths = {name: synthetic(tmp_path, f"arm{i}", loss) for i, (name, loss) in enumerate(names.items())}
    whole = {"ablation": "mine", "arm": "all", "seed": 1, "stage": None, "settings": {"train": "all"}}
    records.write(tmp_path / "all/arm.json", whole | {"unfit": "takes 104 GiB", "start": "tiny"})
    ablation = ArmComparison(budget=STEPS, choose_by=LOSS, reference="b", stages=[])
    for path in [path for several in paths.values() for path in several]:
        change_record(path, settings=LORA)
    change_record(tmp_path / "all/arm.json", settings={"train": "all", "learning_rate": 1e-3})
    report.write("mine", ablation, "tiny", paths | {"all": [tmp_path / "all/arm.json"]}, [], None, tmp_path)
    page = (tmp_path / "ablation_report.html").read_text()
    assert "<b>a</b>" not in page and "&lt;b&gt;a&lt;/b&gt;" in page and "not trained: takes 104 GiB" in page
    assert "Take &lt;b&gt;a&lt;/b&gt;" in page
    assert set(load_csv(tmp_path)["arm"]) == {*paths, "all"} and (tmp_path / "figures/pareto.svg").is_file()
