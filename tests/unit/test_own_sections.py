"""A model's own sections: values of `finetune`, `evaluate` and `calibration` that differ from those of the study."""

import copy

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coppice.models import intake, kinds
from coppice.stages.select import scoring
from coppice.study import settings
from coppice.study.settings import own_sections
from coppice.study.settings.sections.evaluate import Evaluate
from coppice.study.settings.sections.finetune import Finetune

STUDY = """
models:
  A: {base: org/a}
  B: {base: org/b}
finetune: {data: {dataset: {alpaca: 1, notes: 3}}, lora: {r: 16, alpha: 8}, learning_rate: 3.0e-4}
evaluate: {perplexity: {datasets: [wikitext2]}, zero_shot: {tasks: [piqa, boolq], limit: 20}}
datasets:
  notes: {path: org/notes}
  pairs: {path: org/pairs}
"""


def load(own=None, **sections):
    config = yaml.safe_load(STUDY)
    config["models"]["B"] |= own or {}
    return settings.load(copy.deepcopy(config) | sections)


def message(own=None, **sections):
    with pytest.raises(settings.SettingsError) as error:
        load(own, **sections)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_without_own_sections_has_those_of_the_study_themselves():
    study = load()
    for model in study.models:
        assert study.finetune_of(model) is study.finetune and study.evaluate_of(model) is study.evaluate


def test_a_model_has_the_values_of_the_study_where_it_sets_none():
    study = load({"finetune": {"data": {"cutoff_len": 64}}, "evaluate": {"zero_shot": {"limit": 5}}})
    assert study.finetune_of("B").data.cutoff_len == 64 and study.finetune_of("B").learning_rate == 3e-4
    assert study.evaluate_of("B").zero_shot.limit == 5 and study.evaluate_of("B").zero_shot.tasks == ["piqa", "boolq"]
    assert study.finetune_of("A") is study.finetune and study.finetune.data.cutoff_len == 256


RAW = st.fixed_dictionaries(
    {},
    optional={
        "zero_shot": st.fixed_dictionaries(
            {},
            optional={
                "tasks": st.lists(st.sampled_from(["piqa", "boolq", "mine"]), unique=True),
                "limit": st.none() | st.integers(1, 9),
                "metric": st.dictionaries(st.sampled_from(["piqa", "hellaswag", "mine"]), st.just("acc")),
            },
        ),
        "perplexity": st.fixed_dictionaries(
            {},
            optional={
                "datasets": st.lists(st.sampled_from(["a", "b"]), unique=True),
                "protocols": st.dictionaries(
                    st.sampled_from(["x", "y"]), st.fixed_dictionaries({"seq_len": st.integers(2, 9)})
                ),
            },
        ),
        "answers": st.fixed_dictionaries({}, optional={"datasets": st.just(["a"]), "beams": st.integers(1, 4)}),
        "batch_size": st.integers(1, 9),
    },
)


@given(RAW, RAW)
def test_laying_a_section_over_another_is_reading_both_files_in_turn(below, own):
    def joined(one, other):
        return one | {
            key: joined(one[key], value) if isinstance(value, dict) and key in one else value
            for key, value in other.items()
        }

    found = own_sections.overlaid(Evaluate.model_validate(below), Evaluate.model_validate(own))
    expected = Evaluate.model_validate(joined(below, own))
    assert found == expected and found.model_dump(exclude_unset=True) == expected.model_dump(exclude_unset=True)


def test_a_mixture_of_a_model_replaces_that_of_the_study():
    study = load({"finetune": {"data": {"dataset": {"notes": 1}}}})
    assert study.training_datasets("B") == ["notes"] and study.training_datasets("A") == ["alpaca", "notes"]


def test_a_preset_of_a_model_replaces_the_adapter_of_the_study():
    assert load({"finetune": {"lora": {"dropout": 0}}}).finetune_of("B").lora.r == 16
    light = load({"finetune": {"lora": {"preset": "light"}}}).finetune_of("B").lora
    assert (light.r, light.alpha, light.dropout) == (8, 16, 0.1)


def test_a_protocol_of_a_model_stands_beside_those_of_the_study():
    evaluate = {"perplexity": {"protocols": {"long": {"seq_len": 64}}, "datasets": ["wikitext2"]}}
    own = {"perplexity": {"protocols": {"short": {"seq_len": 8}}, "protocol": ["short", "long"]}}
    study = load({"evaluate": own}, evaluate=evaluate)
    assert set(study.evaluate_of("B").perplexity.protocols) == {"long", "short"}
    assert set(study.evaluate_of("A").perplexity.protocols) == {"long"}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"finetune": {"objective": {"kl": 1, "teacher": "C"}}}, "models.B.finetune.objective.teacher: found 'C', but"),
        (
            {"kind": "seq2seq", "prompt": "none", "finetune": {"objective": {"kl": 1, "teacher": "A"}}},
            "models.B.finetune.objective.teacher: A is a causal language model, but B is a sequence-to-sequence model",
        ),
        (
            {"finetune": {"objective": {"temperature": 2}}},
            "models.B.finetune.objective.temperature: has no effect while kl is 0",
        ),
        ({"finetune": {"objective": {"kl": -1}}}, "models.B.finetune.objective.kl: "),
        (
            {"kind": "dual-encoder", "prompt": "none", "finetune": {"objective": {"kl": 1}}},
            "models.B.finetune.objective.kl: a dual encoder (B) cannot be trained on a teacher's predictions",
        ),
        ({"evaluate": {"zero_shot": {"tasks": ["pica"]}}}, "models.B.evaluate.zero_shot.tasks: lm-eval has no task"),
        (
            {"evaluate": {"perplexity": {"datasets": ["wiki"]}}},
            "models.B.evaluate.perplexity.datasets: there is no data",
        ),
        ({"evaluate": {"perplexity": {"protocol": "x"}}}, "models.B.evaluate.perplexity.protocol: found 'x'"),
        ({"evaluate": {"zero_shot": {"task": []}}}, "models.B.evaluate.zero_shot.task is unknown; did you mean"),
        ({"evaluate": {"zero_shot": {"include_path": "."}}}, "models.B.evaluate.zero_shot.include_path: the folder of"),
        ({"evaluate": {"answers": {"beams": 0}}}, "models.B.evaluate.answers.beams: found 0, must be at least 1"),
        ({"finetune": {"data": {"dataset": "nots"}}}, "models.B.finetune.data.dataset: there is no data set 'nots'"),
        ({"finetune": {"data": {"dataset": {}}}}, "models.B.finetune.data.dataset: names no data set"),
        (
            {"kind": "seq2seq", "prompt": "none", "finetune": {"data": {"dataset": {}}}},
            "models.B.finetune.data.dataset: names no data set",
        ),
        ({"finetune": {"data": {"val_size": 1.5}}}, "models.B.finetune.data.val_size: found 1.5"),
        ({"finetune": {"epoch": 1}}, "models.B.finetune.epoch is unknown; did you mean 'models.B.finetune.epochs'"),
        ({"finetune": {"best_by": "blue4"}}, "models.B.finetune.best_by: found 'blue4', but a causal language model"),
        ({"finetune": {"lora": {"towers": {"vision": "full"}}}}, "models.B.finetune.lora.towers: found 'vision', but"),
        ({"calibration": {"dataset": "ptbb"}}, "models.B.calibration.dataset: there is no data set 'ptbb'"),
        ({"calibration": {"samples": 0}}, "models.B.calibration.samples: found 0"),
        (
            {"evaluate": {"retrieval": {"datasets": ["pairs"]}}},
            "models.B.evaluate.retrieval: does not apply to a causal",
        ),
        (
            {"prune": [{"method": "depth", "ratio": 0.5, "tower": "encoder"}]},
            "models.B.prune[0].tower: found 'encoder'",
        ),
        ({"kind": "causal"}, "models.B.kind: found 'causal'; valid are"),
    ],
)
def test_names_the_key_of_the_model_in_an_error(own, words):
    assert f"config key {words}" in message(own)


def test_an_evaluation_that_applies_to_no_kind_is_left_out_of_a_model_without_a_word():
    study = load(evaluate={"retrieval": {"datasets": ["pairs"]}})
    assert not study.evaluate_of("A").retrieval.datasets and "pairs" not in study.datasets
    assert not study.notices


def test_reads_only_the_data_sets_that_some_model_uses():
    own = {"finetune": {"data": {"dataset": "pairs"}}, "evaluate": {"perplexity": {"datasets": ["ptb"]}}}
    study = load(own | {"calibration": {"dataset": "c4"}})
    assert set(study.datasets) == {"alpaca", "notes", "wikitext2", "ptb", "pairs", "c4"}
    assert study.datasets["pairs"].uses == ["training"] and study.datasets["c4"].uses == ["text"]
    assert study.calibration_of("A").dataset == "wikitext2" and study.calibration_of("B").windows == "within-rows"


DUAL = {
    "models": {"B": {"base": "org/clip", "kind": "dual-encoder", "finetune": {"data": {"dataset": "pairs"}}}},
    "select": {"configs": {"best": {"metric": "top1.pairs"}}},
}


def classifier(folder=None, data=None, select=None, **keys):
    evaluate = {"classification": {"datasets": ["pairs"], **keys}}
    config = DUAL | {"evaluate": evaluate, "datasets": {"pairs": {"path": "org/pairs", **(data or {})}}}
    return settings.load(config | ({"select": select} if select else {}), workdir=folder)


def test_names_of_classes_may_be_in_a_file(tmp_path):
    (tmp_path / "classes.txt").write_text("disk\n\n ring \ndisk\n")
    (tmp_path / "one.txt").write_text("disk")
    assert classifier(tmp_path, classes="classes.txt").evaluate_of("B").classification.classes == ["disk", "ring"]
    for classes, words in (("nowhere.txt", "cannot be read"), ("one.txt", "names 1 classes")):
        with pytest.raises(settings.SettingsError, match=f"evaluate.classification.classes: {classes} {words}"):
            classifier(tmp_path, classes=classes)


def test_rejects_a_template_without_a_place_for_the_class():
    with pytest.raises(settings.SettingsError, match=r"evaluate.classification.templates: found 'a photo'"):
        classifier(templates=["a photo"])


def test_the_folder_of_images_is_found_before_any_job(tmp_path):
    with pytest.raises(settings.SettingsError, match=r"datasets.pairs.image_root: there is no folder images"):
        classifier(tmp_path, {"image_root": "images"})
    (tmp_path / "images").mkdir()
    study = classifier(tmp_path, {"image_root": "images"})
    assert study.datasets["pairs"].image_root == str(tmp_path / "images")


def test_a_checkpoint_decides_its_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    own = {"base": str(tmp_path), "finetune": {"data": {"dataset": "pairs"}}}
    evaluate, select = {"answers": {"datasets": ["pairs"]}}, {"configs": {"best": {"metric": ["bleu4.pairs", "piqa"]}}}
    study = load(own, evaluate=evaluate, select=select)
    assert study.models["B"].kind == "seq2seq" and study.models["B"].prompt == "none"
    assert not study.evaluate_of("B").zero_shot.tasks and study.criteria_of("B")["best"]["metric"] == "bleu4.pairs"
    words = message(own | {"kind": "causal-lm"}, evaluate=evaluate, select=select)
    assert "models.B.kind: found 'causal-lm', but the config.json in" in words and "set it to seq2seq" in words
    words = message(own | {"prompt": "chat"}, evaluate=evaluate, select=select)
    assert "models.B.prompt: found 'chat', but a sequence-to-sequence model takes none, alpaca" in words


def test_a_fetched_model_of_another_kind_is_named_with_its_remedy(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    intake.check_kind(tmp_path, "seq2seq")
    with pytest.raises(settings.SettingsError, match=r"a sequence-to-sequence model, .* Set models.B.kind to seq2seq"):
        intake.check_kind(tmp_path, "causal-lm", "B")


def test_criteria_that_apply_to_no_kind_of_the_study_are_left_out():
    usual = {"best_acc": {"metric": "average_acc", "mode": "max"}, "best_ppl": {"metric": "ppl.wikitext2"}}
    study = classifier(select={"configs": usual | DUAL["select"]["configs"]})
    assert study.pairs() == [("B", "best")] and len(study.notices) == 2


def test_seeds_of_a_model_are_its_own():
    study = load({"finetune": {"seeds": [7, 8]}})
    assert study.training_seeds("A") == [42] and study.more_seeds("B") == [8]
    assert study.seed_in("B", "") == 7 and study.seed_in("B", study.seed_folder(8)) == 8


def test_a_key_that_no_study_uses_is_left_out_of_parameters():
    assert not {"answers", "retrieval", "classification"} & Evaluate().model_dump().keys()
    assert "best_by" not in Finetune().model_dump() and "towers" not in Finetune().model_dump()["lora"]
    answers = Evaluate.model_validate({"answers": {"datasets": ["pairs"]}})
    assert Evaluate.model_validate(answers.model_dump()) == answers


SELECT = {"configs": {"best": {"metric": ["ppl.ptb", "average_acc"]}, "small": {"metric": "ppl.wikitext2"}}}


def test_each_model_is_chosen_by_the_first_metric_that_it_has():
    study = load({"evaluate": {"perplexity": {"datasets": ["ptb"]}}}, select=SELECT)
    assert study.criteria_of("A")["best"]["words"] == "max average_acc"
    assert study.criteria_of("B")["best"]["words"] == "min ppl.ptb"


def test_a_criterion_is_left_out_for_a_model_without_its_metric():
    study = load({"evaluate": {"perplexity": {"datasets": ["ptb"]}}}, select=SELECT)
    assert study.pairs() == [("A", "best"), ("A", "small"), ("B", "best")]
    assert study.notices == [
        "config key select.configs.small: is left out for model 'B', which is not measured by ppl.wikitext2"
    ]
    with pytest.raises(settings.SettingsError, match="no config of B 'small' in the study; valid are best"):
        settings.check_targets(study, ["results/pruned_evaluation/B/small/evaluation_results.json"])


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"x": {"metric": ["average_acc", "ppl.ptbb"]}}, "select.configs.x: there is no metric 'ppl.ptbb'"),
        ({"x": {"metric": ["ppl.ptbb", "average_acc"]}}, "select.configs.x: there is no metric 'ppl.ptbb'"),
        (
            {"x": {"metric": ["average_acc", "ppl.wikitext2"], "mode": "max"}},
            "have different directions; leave mode out",
        ),
        ({"x": {"metric": []}}, "select.configs.x.metric: must not be empty"),
    ],
)
def test_rejects_alternatives_that_cannot_be_meant(select, words):
    assert words in message(select={"configs": select})


def test_rejects_a_model_that_no_criterion_can_choose_for():
    own = {"evaluate": {"perplexity": {"datasets": ["ptb"]}}}
    words = message(own, select={"configs": {"small": {"metric": "ppl.wikitext2"}}})
    assert "has a metric by which model 'B' is measured" in words and "models.B.evaluate" in words


def test_candidates_of_a_model_are_scored_on_its_own_data():
    study = load({"evaluate": {"perplexity": {"datasets": ["ptb"]}, "zero_shot": {"tasks": []}}}, select=SELECT)
    assert scoring.datasets(study, "A") == ["wikitext2", "piqa", "boolq"] and scoring.datasets(study, "B") == ["ptb"]
    assert [scoring.needs_rows_of(study, name) for name in ("ptb", "piqa", "alpaca")] == [True, True, False]


def test_an_ablation_has_the_sections_of_the_model_it_starts_from():
    own = {"finetune": {"data": {"dataset": "pairs"}}, "evaluate": {"zero_shot": {"tasks": ["piqa"]}}}
    entry = {"arms": ["light", "full"], "budget": {"max_steps": 200}}
    ablations = {name: entry | {"start": {"model": name, "config": "best_acc"}} for name in ("A", "B")}
    study = load(own, ablations=ablations)
    assert study.ablation_datasets("B") == ["pairs"] and study.ablations["B"].evaluate.zero_shot.tasks == ["piqa"]
    assert study.ablation_datasets("A") == ["alpaca", "notes"]


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_evaluator_of_a_kind_can_be_switched_off(name):
    assert set(kinds.named(name).evaluators) - {"merge"} <= own_sections.OFF.keys()


def test_the_teacher_is_the_dense_model_or_the_named_one_and_none_without_a_divergence():
    study = load({"finetune": {"objective": {"kl": 0.5, "teacher": "A"}}})
    assert study.teacher_of("A") is None and study.teacher_of("B") == "A"
    study = load({"finetune": {"objective": {"ce": 0}}}, finetune={"objective": {"kl": 1, "divergence": "js"}})
    assert study.teacher_of("A") == "A" and study.teacher_of("B") == "B"
    objective = study.finetune_of("B").objective
    assert (objective.ce, objective.kl, objective.divergence) == (0, 1, "js")


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"towers": {"audio": "full"}}, "towers: found 'audio', but a dual encoder (B) has the towers text, vision"),
        ({"towers": {"text": "frozen", "vision": "frozen"}}, "towers: all towers of a dual encoder (B) are frozen"),
        ({"batch_size": 1}, "batch_size: a dual encoder (B) learns by comparing the pairs of a step"),
    ],
)
def test_rejects_an_arm_with_which_the_kind_of_model_would_learn_nothing(arm, words):
    ablation = {"start": {"model": "B"}, "arms": [arm | {"name": "one"}, {"name": "other", "r": 4}]}
    ablation["budget"] = {"tokens": 1000}
    with pytest.raises(settings.SettingsError) as error:
        settings.load(
            DUAL
            | {"evaluate": {"classification": {"datasets": ["pairs"]}}, "datasets": {"pairs": {"path": "org/pairs"}}}
            | {"ablations": {"x": ablation}}
        )
    assert f"config key ablations.x: arm 'one': {words}" in str(error.value)


def test_names_the_ablation_whose_mixture_is_empty():
    ablation = {"start": {"model": "A"}, "arms": ["light", "full"], "data": {"dataset": {}}}
    assert "ablations.x.data.dataset: names no data set" in message(ablations={"x": ablation})


def test_arms_that_start_from_the_dense_model_need_another_teacher():
    taught = {"objective": {"kl": 1}}
    ablation = {"start": {"model": "A"}, "arms": ["light", "full"], "budget": {"max_steps": 500}}
    assert "ablations.x.start: finetune.objective needs another teacher" in message(
        finetune=taught, ablations={"x": ablation}
    )
    chosen = ablation | {"start": {"model": "A", "config": "best_acc"}}
    assert load(finetune=taught, ablations={"x": chosen}).teacher_of_arms("x") == "A"
