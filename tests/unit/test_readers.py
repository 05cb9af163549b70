"""A model's tokenizer and image processor go together into every folder that is written."""

import copy
import json
import re

import pytest

from coppice import models
from coppice.core.errors import CheckpointError
from coppice.models import readers

CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": 9,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 256, "longest_edge": 65536},
}


def test_a_reader_writes_the_processors_files_as_they_are_beside_the_tokenizer(tmp_path, tiny_tokenizer):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    text = json.dumps(PROCESSOR, indent=7)
    (before / "preprocessor_config.json").write_text(text)
    (before / "video_preprocessor_config.json").write_text("{}")
    (before / "config.json").write_text(json.dumps(CONFIG))
    readers.seeing(before, tiny_tokenizer).save(after)
    assert (after / "preprocessor_config.json").read_text() == text
    assert {"video_preprocessor_config.json", "tokenizer.json"} <= {path.name for path in after.iterdir()}


def test_pictures_are_written_as_config_json_says(tmp_path, tiny_tokenizer):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert readers.seeing(tmp_path, tiny_tokenizer).placeholder == readers.Placeholder("w9", "w5w9w6")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"image_token_id": 9000}))
    with pytest.raises(CheckpointError, match=r"the tokens \[5, 9000, 6\], which the tokenizer does not have"):
        readers.seeing(tmp_path, tiny_tokenizer)


def test_a_template_that_only_the_processor_has_is_the_tokenizers_too(tmp_path, tiny_tokenizer):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    tokenizer = copy.copy(tiny_tokenizer)  # other tests share it
    tokenizer.chat_template = None
    assert readers.seeing(tmp_path, tokenizer).tokenizer.chat_template == "{{ messages }}"


def test_the_image_processor_is_the_one_of_pillow_even_beside_torchvision(tmp_path, tiny_tokenizer, monkeypatch):
    """The tests run without torchvision, where transformers would choose Pillow's by itself: it must be asked for."""
    from transformers import AutoImageProcessor

    asked, load = [], AutoImageProcessor.from_pretrained
    monkeypatch.setattr(
        AutoImageProcessor,
        "from_pretrained",
        lambda *words, **options: asked.append(options) or load(*words, **options),
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    reader = readers.seeing(tmp_path, tiny_tokenizer)
    assert asked[0]["backend"] == "pil" and type(reader.image_processor).__name__ == "Qwen2VLImageProcessorPil"


@pytest.mark.parametrize("content", [None, "{", '{"image_processor_type": "Unheard"}'])
def test_a_folder_without_an_image_processor_that_loads_is_named(tmp_path, tiny_tokenizer, content):
    if content:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path)) + ".*Copy preprocessor_config.json"):
        readers.seeing(tmp_path, tiny_tokenizer)


def test_the_reader_of_a_model_of_text_has_no_image_processor(tiny_checkpoint):
    reader = models.Source(str(tiny_checkpoint("llama"))).reader()
    assert reader.image_processor is None and reader.files == ()
