"""Fill-in-the-middle rows in the control tokens of models: their order, what is learned, cutting and safe encoding."""

import pytest
from hypothesis import given
from hypothesis import strategies as some
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from coppice.core.errors import SettingsError
from coppice.data import prompts
from coppice.models import Reader, infilling, text_examples
from coppice.models.causal_lm import KIND

QWEN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
STARCODER = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>", "<file_sep>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
CODELLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
ROW = {"path": "a.py", "repo": "lib", "prefix": "def f(a):\n    ", "middle": "return a", "suffix": "\n\n# end\n"}
TEXTS = ["def f(a):\n    return a + 1\n\n# the end of a file\n", "for x in range(10):\n    print(x)\n"] * 20


def byte_level(names, special=False):
    """Return a tokenizer like Qwen's: BPE of bytes; its infilling tokens are not called special."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    found.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return found


def sentence_piece(names):
    """Return a tokenizer like CodeLlama's: it begins texts with a space and a BOS token."""
    tokenizer = Tokenizer(token_models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=[*special, *alphabet]))
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    found.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return found


def example(tokenizer, row=ROW, cutoff=1000, train_on_inputs=False):
    rows = prompts.Formatter("fim", "none", tokenizer).rows(row, "row 0")
    found = text_examples.examples(rows, tokenizer, cutoff, train_on_inputs)[0]
    return found[0] if found else None


def pieces(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (QWEN, ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")),
        (STARCODER, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")),
        (DEEPSEEK, DEEPSEEK),
    ],
)
def test_a_row_is_prefix_suffix_middle_in_the_models_own_tokens(names, order):
    tokenizer = byte_level(names)
    first, second, third = tokenizer.convert_tokens_to_ids(list(order))
    answer = [*pieces(tokenizer, ROW["middle"]), tokenizer.eos_token_id]
    question = [first, *pieces(tokenizer, ROW["prefix"]), second, *pieces(tokenizer, ROW["suffix"]), third]
    found = example(tokenizer)
    assert found == {"input_ids": question + answer, "labels": [-100] * len(question) + answer}
    rows = [prompts.Formatter("fim", "none", tokenizer).question(ROW, "row 0")]
    assert text_examples.question_ids(rows, tokenizer, 1000) == [question]
    assert example(tokenizer, train_on_inputs=True)["labels"] == question + answer


def test_codellamas_suffix_and_middle_begin_without_a_space_and_end_with_its_own_token():
    tokenizer = sentence_piece(CODELLAMA)
    pre, suf, mid, eot = tokenizer.convert_tokens_to_ids(list(CODELLAMA))
    found = example(tokenizer)["input_ids"]
    assert found[:2] == [tokenizer.bos_token_id, pre] and found[-1] == eot
    suffix = found[found.index(suf) + 1 : found.index(mid)]
    middle = found[found.index(mid) + 1 : -1]
    assert not tokenizer.convert_ids_to_tokens(middle)[0].startswith("▁")
    assert tokenizer.convert_ids_to_tokens(pieces(tokenizer, ROW["middle"]))[0].startswith("▁")
    assert tokenizer.decode([*pieces(tokenizer, "x"), *middle]) == "x" + ROW["middle"]
    assert tokenizer.decode([*pieces(tokenizer, "x"), *suffix]) == "x" + ROW["suffix"]


def test_files_of_the_repository_come_first_in_its_tokens():
    tokenizer = byte_level(QWEN)
    context = [{"path": "b.py", "text": "x = 1\n"}]
    text = tokenizer.decode(example(tokenizer, ROW | {"context": context})["input_ids"])
    before = "<|repo_name|>lib\n<|file_sep|>b.py\nx = 1\n\n<|file_sep|>a.py\n<|fim_prefix|>"
    assert text.startswith(before)
    plain = byte_level(DEEPSEEK)
    text = plain.decode(example(plain, ROW | {"context": context})["input_ids"])
    assert text.startswith("# b.py\nx = 1\n\n<｜fim▁begin｜>")
    text = plain.decode(example(plain, ROW | {"context": "notes\n"})["input_ids"])
    assert text.startswith("notes\n<｜fim▁begin｜>")


@pytest.mark.parametrize("names", [QWEN, DEEPSEEK])
@given(
    some.lists(some.sampled_from(["x", " ", "<", "|>", "<|endoftext|>", "é🌳", *QWEN, *DEEPSEEK]), max_size=12),
    some.integers(0, 2),
)
def test_no_text_becomes_a_control_token(names, words, place):
    tokenizer = TOKENIZERS[names]
    text = "".join(words)
    column = ("prefix", "middle", "suffix")[place]
    row = ROW | {column: text or "x"}
    found = example(tokenizer, row)
    if found is None:  # a middle of spaces
        assert not row["middle"].strip()
        return
    control = {tokenizer.convert_tokens_to_ids(name) for name in (*names, "<|endoftext|>")}
    assert sum(token in control for token in found["input_ids"]) == 4  # three of the form, and the end
    assert text in tokenizer.decode(found["input_ids"])


TOKENIZERS = {names: byte_level(names) for names in (QWEN, DEEPSEEK)}


@given(some.integers(0, 60), some.integers(0, 60), some.integers(0, 60), some.integers(10, 120))
def test_cutting_takes_context_first_then_the_far_ends_and_never_the_middle(before, left, right, cutoff):
    tokenizer = TOKENIZERS[QWEN]
    row = ROW | {"context": "c" * before, "prefix": "p" * left, "suffix": "s" * right, "middle": "mmmm"}
    found = example(tokenizer, row, cutoff=cutoff)
    whole = before + left + right + 4 + 4
    assert len(found["input_ids"]) == min(cutoff, whole)
    text = tokenizer.decode(found["input_ids"])
    counts = {
        letter: text.replace("fim_prefix", "").replace("fim_suffix", "").replace("fim_middle", "").count(letter)
        for letter in "cpsm"
    }
    assert counts["m"] == 4
    room = cutoff - 8
    assert counts["c"] == max(0, min(before, room - left - right))
    kept = min(left + right, room)
    assert counts["p"] + counts["s"] == kept
    assert counts["p"] >= min(left, kept // 2) and counts["s"] >= min(right, kept // 2)


def test_the_prefix_keeps_its_end_and_the_suffix_its_beginning():
    tokenizer = TOKENIZERS[QWEN]
    row = ROW | {"prefix": "0123456789", "suffix": "ABCDEFGHIJ", "middle": "m"}
    text = tokenizer.decode(example(tokenizer, row, cutoff=15)["input_ids"])
    assert text == "<|fim_prefix|>56789<|fim_suffix|>ABCDE<|fim_middle|>m<|endoftext|>"


def test_a_row_whose_middle_does_not_fit_is_left_out():
    assert example(TOKENIZERS[QWEN], ROW | {"middle": "m" * 50}, cutoff=40) is None


def test_a_tokenizer_without_infilling_tokens_is_rejected_with_what_to_do():
    with pytest.raises(SettingsError, match=r"no tokens for filling in the middle.*completion: middle"):
        prompts.Formatter("fim", "none", byte_level(()))


def test_a_single_line_ends_with_its_line():
    formatter = prompts.Formatter("fim", "none", TOKENIZERS[QWEN])
    assert formatter.question(ROW | {"kind": "line"}, "row 0").stop == ("\n",)
    assert formatter.question(ROW | {"kind": "body"}, "row 0").stop == ()


def test_causal_models_learn_from_columns_prefix_middle_suffix():
    assert prompts.kind_of(["path", "prefix", "middle", "suffix", "context"], "code", KIND.row_kinds) == "fim"
    assert (
        len(
            KIND.examples(
                prompts.Formatter("fim", "none", TOKENIZERS[QWEN]).rows(ROW, ""), Reader(TOKENIZERS[QWEN]), 99, False
            )
        )
        == 1
    )
    assert infilling.tokens_of(TOKENIZERS[QWEN]).file == "<|file_sep|>"
