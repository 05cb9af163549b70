"""The picture and code worlds: texts agree with pixels and code, held-out rows are new, and the models load."""

import ast
import hashlib
import random
import re
from pathlib import Path

import pytest
import yaml
from snakemake.utils import update_config

from coppice import data, miniature
from coppice.miniature import code_world, kind_training, picture_world, prepare, scenes, tiny_models
from coppice.models import kinds
from coppice.study import settings
from coppice.study.settings import registry

CONFIG = Path(__file__).parents[2] / "config"
SIZES = {"report": 40, "selection": 20, "train": 120}
# Written down once more: the tests read the texts without the package's own tables
COLORS = {
    "red": (222, 45, 38),
    "green": (35, 160, 70),
    "blue": (55, 95, 225),
    "yellow": (240, 215, 60),
    "purple": (145, 70, 185),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
    "gray": (115, 115, 115),
    "brown": (115, 72, 38),
}
CORNERS = {"top left": (0, 0), "top right": (32, 0), "bottom left": (0, 32), "bottom right": (32, 32)}
SHAPE = re.compile(r"a (small|large) (\w+) (\w+) at the (\w+ \w+)")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture_world, "SCENES", SIZES)
        prepare.prepare_pictures(folder, seed=7)
    return folder


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_world, "MODULES", 80)
        prepare.prepare_code(folder, seed=7)
    return folder


def rows(world, dataset, role):
    return data.load(world / dataset / "dataset.json", role).to_list()


def picture(world, row):
    from PIL import Image

    (image,) = row["images"]
    path = world / "pictures" / image["path"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == image["sha256"]
    return Image.open(path).convert("RGB")


def shapes_in(caption):
    return SHAPE.findall(caption)


def test_a_full_caption_says_what_the_pixels_show(world):
    for row in rows(world, "picture-captions", "report"):
        pixels, caption = picture(world, row), row["captions"][0]
        ground = re.search(r"on a (\w+) background", caption)[1]
        said = {place: color for _, color, _, place in shapes_in(caption)}
        for place, (x, y) in CORNERS.items():
            seen = {color for _, color in pixels.crop((x, y, x + 32, y + 32)).getcolors()}
            assert seen == {COLORS[ground], COLORS[said.get(place, ground)]}, caption


def test_every_question_has_the_answer_that_the_full_caption_gives(world):
    captions = {row["images"][0]["path"]: row["captions"][0] for row in rows(world, "picture-captions", "report")}
    for row in rows(world, "picture-questions", "report"):
        caption, question, answer = captions[row["images"][0]["path"]], row["question"], row["answer"]
        fitting = [shape for shape in shapes_in(caption) if all(word in shape for word in named_in(question))]
        if "background" in question:
            assert f"on a {answer} background" in caption
        elif "How many" in question:
            assert answer == ["one", "two"][len(shapes_in(caption)) - 1]
        else:
            assert len(fitting) == 1 and answer in fitting[0], (caption, question, answer)


def named_in(question):
    known = [*COLORS, "circle", "square", "triangle", "diamond", "cross"]
    return [word for word in question.rstrip("?").split() if word in known]


def test_no_held_out_scene_is_in_another_role(world):
    found = {role: {row["captions"][0] for row in rows(world, "captions", role)} for role in SIZES}
    assert found["report"].isdisjoint(found["selection"])
    assert (found["report"] | found["selection"]).isdisjoint(found["train"])
    assert len(found["report"]) == SIZES["report"] and len(found["selection"]) == SIZES["selection"]


def test_a_class_is_that_of_the_only_shape(world):
    captions = {row["images"][0]["path"]: row["captions"][0] for row in rows(world, "picture-captions", "report")}
    labeled = rows(world, "picture-classes", "report")
    assert labeled and {row["label"] for row in labeled} <= set(scenes.labels()) and len(scenes.labels()) == 30
    for row in labeled:
        ((_, color, form, _),) = shapes_in(captions[row["images"][0]["path"]])
        assert row["label"] == f"{color} {form}"


def test_the_same_seed_gives_the_same_rows_and_pictures(world, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_world, "SCENES", SIZES)
    again = picture_world.build_pictures(tmp_path, seed=7)
    other = picture_world.build_pictures(tmp_path / "other", seed=8)
    for name in registry.PICTURE_DATASETS:
        assert again[name]["report"] == rows(world, name, "report")
        assert again[name]["report"] != other[name]["report"]


def test_functions_compute_what_their_docstrings_say(tmp_path):
    said = {
        "plus": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "times": lambda a, b: a * b,
        "divided by": lambda a, b: a / b,
        "larger of": max,
        "smaller of": min,
        "equals": lambda a, b: a == b,
    }
    code_world.build_tree(tmp_path, seed=7)
    seen, generator = set(), random.Random(1)
    for path in sorted(tmp_path.rglob("*.py"))[:100]:
        space = {}
        exec(path.read_text(), space)
        for node in ast.parse(path.read_text()).body[1:]:
            function, (a, b) = space[node.name], (generator.uniform(1, 9), generator.uniform(1, 9))
            meaning = next(compute for words, compute in said.items() if f" {words} " in function.__doc__)(a, b)
            assert function(a, b) == (round(meaning) if "rounded" in function.__doc__ else meaning)
            if "if there is no" in function.__doc__:
                assert function(a, None) == a
            assert function.__doc__ + node.name not in seen
            seen.add(function.__doc__ + node.name)


def test_rows_of_code_fit_together_into_files_of_one_role_each(code):
    paths = {}
    for role in data.ROLES:
        paths[role] = {row["path"] for row in rows(code, "code-files", role)}
        for row in rows(code, "code", role):
            ast.parse(row["prefix"] + row["middle"] + row["suffix"])
            assert row["path"] in paths[role]
    assert paths["train"].isdisjoint(paths["report"] | paths["selection"])


def test_the_lists_of_miniatures_agree():
    assert set(registry.OTHER_MINIATURES) == set(miniature.KIND_MODELS) == set(kind_training.TRAINED)
    assert set(registry.PICTURE_DATASETS) == set(picture_world.ROWS)
    used = {name for model in miniature.KIND_MODELS.values() for name in model.datasets}
    assert used <= set(registry.MINIATURE_DATASETS)


def test_the_study_of_kinds_has_a_model_of_each_kind_and_a_criterion_for_each():
    content, own = (yaml.safe_load((CONFIG / name).read_text()) for name in ("config.yaml", "kinds.yaml"))
    update_config(content, own)
    study = settings.load(content)
    assert sorted(model.kind for model in study.models.values()) == sorted(kinds.KINDS)
    leading = {name: study.criteria_of(name)["best_score"]["metric"] for name in study.models}
    assert leading == {
        "Captioner": "bleu4.captions",
        "Viewer": "exact_match.picture-questions",
        "Searcher": "text_to_image_r1.picture-pairs",
        "Coder": "exact_match.code",
    }
    assert not study.notices and study.shares_candidate_jobs()


@pytest.mark.parametrize("name", registry.OTHER_MINIATURES)
def test_a_trained_miniature_loads_in_plain_transformers(name, world, code, tmp_path):
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    folders = {
        dataset: (code if dataset == "code" else world) / dataset for dataset in miniature.KIND_MODELS[name].datasets
    }
    sources = [folder / "dataset.json" for folder in folders.values()]
    facts = kind_training.train_kind(name, sources, tmp_path, seed=7, steps=2)
    assert facts["steps"] == 2 and facts["final_loss"] > 0
    auto = {"t5": "Seq2SeqLM", "qwen3-vl": "ImageTextToText", "clip": "", "code": "CausalLM"}[name]
    model = getattr(transformers, f"AutoModel{'For' if auto else ''}{auto}").from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = model.config.get_text_config()
    assert text.vocab_size == len(tokenizer) and text.eos_token_id == tokenizer.eos_token_id
    assert model.config.model_type == tiny_models.expected(name)["model_type"]
    if name in ("qwen3-vl", "clip"):
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        image = picture(world, rows(world, "picture-captions", "report")[0])
        assert processor(image, return_tensors="pt")["pixel_values"].numel() in (64 * 64 * 3, 2 * 64 * 64 * 3)
