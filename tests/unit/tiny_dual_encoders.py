"""Tiny random CLIP and SigLIP checkpoints with tokenizers and image processors, and pictures for them."""

import hashlib
import json
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

WORDS = [
    f"{size} {color} {shape}"
    for size in ("big", "small")
    for color in ("red", "blue", "green", "white")
    for shape in ("disk", "bar", "ring")
]
SIDE, PATCH, TOKENS = 16, 8, 12


@dataclass(frozen=True)
class Picture:
    """A picture of one color, as the data sets' pictures open."""

    number: int

    @property
    def sha256(self):
        return hashlib.sha256(str(self.number).encode()).hexdigest()

    def open(self):
        noise = numpy.random.default_rng(self.number)
        return Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=numpy.uint8))


def clip_tokenizer():
    raw = CLIPTokenizer()
    bpe = Tokenizer(tokenizer_models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = raw.backend_tokenizer.normalizer, raw.backend_tokenizer.pre_tokenizer
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe.train_from_iterator(
        [*WORDS, "a photo of a"],
        trainers.BpeTrainer(vocab_size=120, special_tokens=special, end_of_word_suffix="</w>", show_progress=False),
    )
    content = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]], model_max_length=TOKENS
    )


def siglip_tokenizer():
    words = dict.fromkeys(word for text in [*WORDS, "a photo of a"] for word in text.split())
    plain = Tokenizer(
        tokenizer_models.WordLevel(
            {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>"
        )
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def save(kind, folder, seed=0, dropout=0.0):
    """Write a tiny checkpoint of `kind` (clip, metaclip or siglip) with random weights that spread its embeddings."""
    tokenizer = siglip_tokenizer() if kind == "siglip" else clip_tokenizer()
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        attention_dropout=dropout,
    )
    text |= dict(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id
    )
    vision = dict(
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        attention_dropout=dropout,
    )
    torch.manual_seed(seed)
    if kind != "siglip":
        builder, configuration = {"clip": (CLIPModel, CLIPConfig), "metaclip": (MetaClip2Model, MetaClip2Config)}[kind]
        model = builder(configuration(text_config=text, vision_config=vision, projection_dim=8))
        processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    else:
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 20}, vision_config=vision))
        processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0, 0.3)
        model.logit_scale.fill_(1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
