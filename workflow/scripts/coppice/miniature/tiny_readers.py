"""Tokenizers and image processors of the tiny models that caption, answer, search or complete code.

Each is a class that plain `AutoTokenizer` and `AutoImageProcessor` load. Image processors use the Pillow backend: no
job imports torchvision.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .scenes import SIDE
from .tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

# Qwen's names, which its models and processors look for
END, IMAGE, FILL = "<|im_end|>", "<|image_pad|>", ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
VISION = ("<|vision_start|>", "<|vision_end|>")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", END, *VISION, IMAGE, "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LETTER_LOG_PROBABILITY = -12.0  # far below that of any word, so that letters spell only unknown words


def t5(texts: Sequence[str], length: int) -> PreTrainedTokenizerBase:
    """Return a T5 tokenizer whose pieces are the words of the texts, and letters for other words.

    A trained unigram model would split words of so small a world into letters: several times as many tokens.
    """
    from transformers import T5Tokenizer

    words = Counter("\u2581" + word for text in texts for word in text.split())
    letters = {letter for word in words for letter in word} - words.keys()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, math.log(count / words.total())) for word, count in sorted(words.items())]
    pieces += [(letter, LETTER_LOG_PROBABILITY) for letter in sorted(letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def qwen3_vl(texts: Sequence[str], length: int, vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer with Qwen's control tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(QWEN_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    named = {"image_token": IMAGE, "video_token": "<|video_pad|>"}
    named |= {"vision_start_token": VISION[0], "vision_end_token": VISION[1]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token="<|endoftext|>",
        model_max_length=length,
        extra_special_tokens=named,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3_vl_images(patch: int, merge: int) -> BaseImageProcessor:
    """Return Qwen's image processor for small pictures. merge: patches by side of a token."""
    from transformers import Qwen2VLImageProcessorPil

    # The class's default bounds would enlarge pictures this small
    bounds = {"shortest_edge": (SIDE // 4) ** 2, "longest_edge": SIDE**2}
    return Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=merge, size=bounds, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def clip(texts: Sequence[str], length: int, vocabulary: int) -> PreTrainedTokenizerBase:
    """Return CLIP's tokenizer with a vocabulary of its own."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    original = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = original.normalizer, original.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=length)


def clip_images() -> BaseImageProcessor:
    """Return CLIP's image processor for small pictures."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def code(texts: Sequence[str], length: int, vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer with Qwen2.5-Coder's tokens for filling in the middle."""
    return train_tokenizer(texts, vocabulary, length, extra=FILL)
