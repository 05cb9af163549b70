"""Perplexity agrees with a ten-line float64 loop, and its windows with the definitions of the protocols."""

import copy
import json
import math
import os
import re
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coppice import data
from coppice.core.errors import DataError
from coppice.models import output_head
from coppice.stages.evaluate import documents, perplexity
from coppice.study.settings.sections.evaluate import Perplexity


def reference(model, ids, length, prefix=()):
    """Return (perplexity, scored tokens) of windows of `length` ids behind a prefix in float64, whole windows only."""
    model = model.double()
    losses = []
    for start in range(0, len(ids) - length + 1, length):
        window = torch.tensor([[*prefix, *ids[start : start + length]]])
        logits = model(input_ids=window).logits[0, :-1].log_softmax(-1)
        losses += (-logits[range(window.shape[1] - 1), window[0, 1:]]).tolist()
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.fixture(scope="module")
def beginning(tiny_tokenizer):
    """Return a copy of the tokenizer that begins each text with BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


ROWS = [" ".join(f"w{3 + (7 * i + j * j) % 125}" for j in range(40)) for i in range(30)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(
    ("bos", "counts", "length", "prefix"),
    [
        ("none", True, 64, []),
        ("every-window", True, 63, [1]),
        ("every-window", False, 64, [1]),  # as in shortened-llm: BOS costs no token of text
        ("once", True, 64, []),
    ],
)
def test_agrees_with_a_float64_loop(tiny_model, beginning, architecture, bos, counts, length, prefix):
    protocol = perplexity.Protocol("test", 64, 64, join={"": " "}, bos=bos, bos_counts=counts)
    result, losses = perplexity.measure(tiny_model(architecture), beginning, ROWS, "x", protocol)
    # with its special tokens, as GPTQ and LLM-Pruner encode the whole text
    ids = beginning(" ".join(ROWS), add_special_tokens=bos == "once")["input_ids"]
    value, tokens = reference(tiny_model(architecture), ids, length, prefix)
    facts = result["protocol"]
    assert (facts["bos"], facts["bos_counts"], facts["seq_len"], facts["version"]) == (bos, counts, 64, 1)
    assert result["value"] == pytest.approx(value, rel=1e-5)
    assert result["tokens"] == tokens == sum(window["tokens"] for window in losses["window_losses"])


def test_a_tokenizer_that_adds_no_bos_gets_none_once(tiny_model, tiny_tokenizer):
    without, once = (
        perplexity.measure(
            tiny_model("llama"), tiny_tokenizer, ROWS, "x", perplexity.Protocol("test", 64, 64, join={"": " "}, bos=bos)
        )[1]
        for bos in ("none", "once")
    )
    assert without == once


def test_bos_before_the_text_is_scored_by_nothing_and_covers_no_character(tiny_model, beginning):
    protocol = perplexity.Protocol("test", 200, 200, join={"": " "}, bos="once")
    rows = ["w5 w66 w7", "w9 w10"]
    result, losses = perplexity.measure(tiny_model("llama"), beginning, rows, "x", protocol)
    assert (result["tokens"], result["words"], result["bytes"]) == (5, 5, len("w5 w66 w7 w9 w10"))
    assert losses["window_losses"][0]["tokens"] == 5 and result["documents"] == 1


@pytest.mark.parametrize("counts", [True, False])
def test_a_window_with_its_bos_fits_the_models_context(tiny_model, tiny_tokenizer, counts):
    protocol = perplexity.Protocol("test", 1024, 1024, join={"": " "}, bos="every-window", bos_counts=counts)
    result, losses = perplexity.measure(tiny_model("llama"), tiny_tokenizer, ROWS, "x", protocol)
    assert result["protocol"]["seq_len"] == 256 - (not counts)
    assert {window["tokens"] for window in losses["window_losses"]} == {255}


def overlapping_reference(model, ids, seq_len, stride):
    """Return {position: loss} of strided windows in float64; the first window that reaches a token scores it."""
    model, losses = model.double(), {}
    for start in range(0, len(ids) - seq_len + 1, stride):
        window = ids[start : start + seq_len]
        logits = model(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        for place in range(1, seq_len):
            losses.setdefault(start + place, -logits[place - 1, window[place]].item())
    return losses


@pytest.mark.parametrize("stride", [64, 48, 16, 1])
def test_overlapping_windows_agree_with_a_float64_loop(tiny_model, tiny_tokenizer, stride):
    rows = ROWS[:6]
    protocol = perplexity.Protocol("test", 64, stride, join={"": " "})
    result, _ = perplexity.measure(tiny_model("qwen2"), tiny_tokenizer, rows, "x", protocol)
    ids = tiny_tokenizer(" ".join(rows), add_special_tokens=False)["input_ids"]
    losses = overlapping_reference(tiny_model("qwen2"), ids, 64, stride)
    assert result["tokens"] == len(losses)
    assert result["value"] == pytest.approx(math.exp(math.fsum(losses.values()) / len(losses)), rel=1e-5)


ARTICLES = [
    "",
    " = One = ",
    "",
    "w5 w66 w7 w120",
    " = = Part = = ",
    "",
    "w9 w10",
    "",
    " = Two ( w5 ) = ",
    "",
    "w11 w12",
]


def test_a_document_begins_with_a_title_between_blank_rows():
    assert documents.first_rows(ARTICLES) == [0, 8]
    assert documents.first_rows(["w1 w2", *ARTICLES[1:]]) == [0, 8], "a title between text is a formula"
    assert documents.first_rows(["w1", "", " = Two = "]) == [0, 2]
    assert documents.first_rows(["w1 w2", "w3 w4"]) == [0]
    for row in (" = = Part = = ", " = 1 henry and C = 2 ", " = ", " = = "):
        assert documents.first_rows(["w1", "", row, ""]) == [0], row


@pytest.mark.parametrize(("stride", "bos"), [(8, None), (3, None), (7, 1)])
def test_losses_by_document_agree_with_a_float64_loop(tiny_model, tiny_tokenizer, stride, bos):
    """The loss of a token counts for the document that its text is in, whatever window scored it."""
    rows = ["", " = w3 = ", "", "w5 w66 w7 w120 w8 w9 w9", "", " = w4 w5 = ", "", "w9 w10 w11 w12 w13 w14"] * 2
    where = "every-window" if bos else "none"
    model, protocol = tiny_model("llama"), perplexity.Protocol("test", 8, stride, join={"": "\n"}, bos=where)
    result, losses = perplexity.measure(model, tiny_tokenizer, rows, "x", protocol)
    tokens = tiny_tokenizer("\n".join(rows), add_special_tokens=False, return_offsets_mapping=True)
    text, model = "\n".join(rows), model.double()
    heads = [text.index(" = w3"), text.index(" = w4")]
    heads += [text.index(" = w3", heads[1]), text.index(" = w4", heads[1] + 1)]
    expected, seen = [[], [], [], []], set()
    width = 8 - bool(bos)
    for start in range(0, len(tokens["input_ids"]) - width + 1, stride):
        window = [bos] * bool(bos) + tokens["input_ids"][start : start + width]
        logits = model(input_ids=torch.tensor([window])).logits[0].log_softmax(-1)
        for place in range(1, 8):
            token = start + place - bool(bos)
            if token not in seen:
                begin = tokens["offset_mapping"][token][0]
                document = max(sum(head <= begin for head in heads) - 1, 0)
                expected[document].append(-logits[place - 1, window[place]].item())
                seen.add(token)
    found = losses["document_losses"]
    assert [one["tokens"] for one in found] == [len(each) for each in expected]
    assert result["documents"] == sum(map(bool, expected))
    means = [sum(each) / len(each) if each else 0.0 for each in expected]
    assert [one["nll_per_token"] for one in found] == pytest.approx(means, rel=1e-5)


def test_a_text_without_titles_is_one_document(tiny_model, tiny_tokenizer):
    protocol = perplexity.Protocol("test", 64, 64, join={"": " "})
    result, losses = perplexity.measure(tiny_model("llama"), tiny_tokenizer, ROWS, "x", protocol)
    assert result["documents"] == 1 and losses["document_losses"] is None


def test_word_and_byte_perplexity_divide_the_same_loss_by_the_scored_text(tiny_model, tiny_tokenizer):
    rows = ["w5 w66 w7 w120", "w9 w10 w11 w12", "w3 w4"]
    protocol = perplexity.Protocol("test", 4, 4, join={"": "\n"})
    result, _ = perplexity.measure(tiny_model("llama"), tiny_tokenizer, rows, "x", protocol)
    # A token is a word here, and two windows of four tokens fit. The first token of a window is not scored; each other
    # token is scored with the space before it.
    scored = [" w66", " w7", " w120", " w10", " w11", " w12"]
    total = result["nll_per_token"] * result["tokens"]
    assert (result["tokens"], result["words"], result["bytes"]) == (6, 6, sum(map(len, scored)))
    assert result["word_perplexity"] == pytest.approx(math.exp(total / 6))
    assert result["byte_perplexity"] == pytest.approx(math.exp(total / result["bytes"]))
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"])


def test_counts_utf8_bytes_and_gives_a_word_to_the_token_that_ends_it():
    text = "né 汉字 ab\u2003c 😀"
    spans = [(0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8), (9, 10), (11, 12)]
    everything = [perplexity.Window(None, 8, 8)]
    assert perplexity.scored_text(text, spans, everything) == (len(text.split()), len(text.encode()))
    all_but_first = [perplexity.Window(None, 7, 8)]
    assert perplexity.scored_text(text, spans, all_but_first) == (len(text.split()), len(text[1:].encode()))
    assert perplexity.scored_text(text, spans, [perplexity.Window(None, 1, 3)]) == (0, len(" 汉".encode()))


@given(text=st.text(st.sampled_from("ab é\n汉"), min_size=2, max_size=80), seq_len=st.integers(2, 9), data=st.data())
def test_overlapping_windows_score_all_words_and_bytes_after_the_first_token(text, seq_len, data):
    stride = data.draw(st.integers(1, max(1, seq_len - 1)))
    spans = [(i, i + 1) for i in range(len(text))]  # a token is a character
    pieces = list(perplexity.windows(torch.arange(len(text)), seq_len, stride))
    words, size = perplexity.scored_text(text, spans, pieces)
    seen = text[1 : pieces[-1].end]
    assert size == len(seen.encode())
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    assert words == sum(1 < end <= pieces[-1].end for end in ends)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the size in bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not any(tensor is given for given in arguments):
                view = tensor._is_view() if hasattr(tensor, "_is_view") else False
                size = 0 if view else tensor.numel() * tensor.element_size()
                self.largest = max(self.largest, size)
        return made


@pytest.mark.parametrize("vocab_size", [128, 30000])
def test_memory_does_not_grow_with_the_vocabulary(tiny_model, tiny_tokenizer, monkeypatch, vocab_size):
    monkeypatch.setattr(output_head, "CHUNK_BYTES", 2**20)
    model = tiny_model("llama", vocab_size=vocab_size)
    protocol = perplexity.Protocol("test", 128, 128, join={"": " "})
    with LargestTensor() as seen:
        perplexity.measure(model, tiny_tokenizer, ROWS, "x", protocol)
    weight = model.lm_head.weight
    transposed = weight.numel() * weight.element_size()  # some kernels copy the weight
    assert seen.largest <= max(2 * 2**20, transposed)
    assert vocab_size == 128 or seen.largest < 1200 * vocab_size * 4 / 10, "all the text's logits, a tenth of them"


def test_a_shorter_context_keeps_the_ratio_of_stride_to_window(tiny_model, tiny_tokenizer):
    protocol = perplexity.Protocol("half", 1024, 512, join={"": " "})
    result, _ = perplexity.measure(tiny_model("llama"), tiny_tokenizer, ROWS, "x", protocol)
    assert (result["protocol"]["seq_len"], result["protocol"]["stride"]) == (256, 128)


def test_finds_protocols_by_name_and_in_the_configuration():
    own = {"mine": {"seq_len": 64, "stride": 32, "join": "", "role": "train", "bos": None}}
    found = perplexity.protocols(
        Perplexity.model_validate({"protocol": ["mine", "gptq-2048"], "bos": "every-window", "protocols": own})
    )
    assert [(p.name, p.seq_len, p.stride, p.bos) for p in found] == [
        ("mine", 64, 32, "every-window"),
        ("gptq-2048", 2048, 2048, "every-window"),
    ]
    assert found[0].join_of("c4") == "" and found[0].role_of("c4", "report") == "train"
    assert found[0].role_of("c4", "selection") == "selection"
    begun = Perplexity.model_validate(
        {"protocol": "mine", "bos": "once", "protocols": {"mine": own["mine"] | {"bos": "none"}}}
    )
    assert perplexity.protocols(begun)[0].bos == "none"


def test_a_new_version_of_a_protocol_has_another_record_and_the_old_one_keeps_a_name():
    for name, bos in (("gptq-2048", "once"), ("llmpruner-128", "once")):
        [new], [old] = (perplexity.protocols(Perplexity(protocol=one)) for one in (name, f"{name}-v1"))
        assert (new.bos, new.version, old.bos, old.version) == (bos, 2, "none", 1)
        assert [new.facts(text)["role"] for text in ("ptb", "x")] == [old.facts(text)["role"] for text in ("ptb", "x")]
        assert (new.seq_len, new.stride, new.join) == (old.seq_len, old.stride, old.join)
    [short] = perplexity.protocols(Perplexity(protocol="shortened-llm-128"))
    assert (short.seq_len, short.bos, short.bos_counts) == (128, "every-window", False)
    assert short.role_of("ptb", "report") == "selection"


REALDATA = Path(os.environ.get("COPPICE_REALDATA", Path(__file__).parents[3] / "shared/realdata"))
# (protocol, text) -> file, separator of its rows, window length; written here from the protocols' papers
REAL = {
    ("gptq-2048", "wikitext2"): ("wikitext2/test.jsonl", "\n\n", 2048),
    ("gptq-2048", "ptb"): ("ptb/ptb.test.txt", " ", 2048),
    ("llmpruner-128", "wikitext2"): ("wikitext2/test.jsonl", "\n\n", 128),
    ("llmpruner-128", "ptb"): ("ptb/ptb.valid.txt", "\n\n", 128),
}


@pytest.fixture(scope="module")
def letters():
    """Return a tokenizer that makes each character one token, so that the tokens of a text need no counting."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"\uffff": 0} | {chr(code): 1 + code for code in range(127)}  # PTB contains the usual "<unk>"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\uffff"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\uffff")


@pytest.mark.skipif(not REALDATA.is_dir(), reason=f"no real data at {REALDATA} (set COPPICE_REALDATA)")
@pytest.mark.parametrize(("name", "dataset"), REAL)
@pytest.mark.slow
def test_real_texts_give_the_windows_that_the_protocols_define(letters, monkeypatch, tmp_path, name, dataset):
    source = {"wikitext2": {"format": "json", "path": str(REALDATA / "wikitext2")}}.get(
        dataset, {"format": "text", "path": str(REALDATA / "ptb")}
    )
    names = {"wikitext2": ("validation.jsonl", "test.jsonl"), "ptb": ("ptb.valid.txt", "ptb.test.txt")}[dataset]
    entry = source | {"splits": {"selection": names[0], "report": names[1]}, "uses": ["text"]}
    data.prepare(dataset, entry, tmp_path)
    protocol = perplexity.PROTOCOLS[name]
    role = protocol.role_of(dataset, "report")
    rows, split = data.texts(tmp_path / "dataset.json", role), data.facts(tmp_path / "dataset.json", role)["split"]

    file, join, length = REAL[name, dataset]
    raw = (REALDATA / file).read_text(encoding="utf-8")
    lines = raw.split("\n")[:-1]
    expected = join.join(json.loads(line)["text"] if file.endswith("jsonl") else line.strip() for line in lines)
    assert split == Path(file).name and join.join(rows) == expected

    count = len(expected) // length
    monkeypatch.setattr(
        perplexity, "_token_losses", lambda model, pieces, label: [numpy.ones(piece.scored) for piece in pieces]
    )
    monkeypatch.setattr(perplexity.models, "context_length", lambda model: 8192)
    result, losses = perplexity.measure(None, letters, rows, dataset, protocol, split=split)
    assert result["documents"] == (60 if dataset == "wikitext2" else 1)  # the articles of WikiText-2's test split
    if dataset == "wikitext2":
        assert sum(document["tokens"] for document in losses["document_losses"]) == result["tokens"]
    assert (result["windows"], result["tokens"]) == (count, count * (length - 1))
    assert result["protocol"] == {
        "name": name,
        "split": split,
        "join": join,
        "seq_len": length,
        "stride": length,
        "bos": "once",
        "bos_counts": True,
        "version": 2,
    }
    kept = expected[: count * length]
    unscored = kept[::length]
    assert result["bytes"] == len(kept.encode()) - len(unscored.encode())
    ends = [match.end() - 1 for match in re.finditer(r"\S+", expected)]
    assert result["words"] == sum(end < len(kept) and end % length != 0 for end in ends)
    with_bos = list(perplexity.windows(torch.zeros(len(expected)), length - 1, length - 1, bos=1))
    assert len(with_bos) == len(expected) // (length - 1) and {window.scored for window in with_bos} == {length - 1}


def test_a_shorter_context_shortens_the_windows_and_is_recorded(tiny_model, tiny_tokenizer):
    result, _ = perplexity.measure(
        tiny_model("llama"), tiny_tokenizer, ROWS, "wikitext2", perplexity.PROTOCOLS["gptq-2048"]
    )
    assert result["protocol"]["seq_len"] == 256 and result["protocol"]["requested_seq_len"] == 2048


def test_a_text_shorter_than_a_window_is_one_window(tiny_model, tiny_tokenizer):
    result, losses = perplexity.measure(
        tiny_model("llama"), tiny_tokenizer, ["w5 w6 w7"], "x", perplexity.PROTOCOLS["gptq-2048"]
    )
    assert result["tokens"] == 2 and len(losses["window_losses"]) == 1


def test_rejects_an_empty_text(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match="ptb"):
        perplexity.measure(tiny_model("llama"), tiny_tokenizer, [""], "ptb", perplexity.PROTOCOLS["gptq-2048"])


@given(length=st.integers(2, 300), seq_len=st.integers(3, 40), bos=st.booleans(), data=st.data())
def test_scores_no_target_twice_and_leaves_out_none_between_others(length, seq_len, bos, data):
    width = seq_len - bos
    stride = data.draw(st.integers(1, width))
    ids = torch.arange(10, 10 + length)
    scored = []
    for piece, count, end in perplexity.windows(ids, width, stride, 1 if bos else None):
        assert len(piece) <= seq_len and count <= len(piece) - 1
        scored += piece[len(piece) - count :].tolist()
        assert scored[-1] == end + 9
    assert len(scored) == len(set(scored))
    if stride < width and not bos:
        assert scored == list(range(scored[0], scored[-1] + 1))


def test_protocols_name_their_rows_and_separators():
    gptq, pruner = perplexity.PROTOCOLS["gptq-2048"], perplexity.PROTOCOLS["llmpruner-128"]
    assert (gptq.join_of("wikitext2"), gptq.join_of("ptb")) == ("\n\n", " ")
    assert (pruner.join_of("wikitext2"), pruner.join_of("ptb")) == ("\n\n", "\n\n")
    assert gptq.role_of("ptb", "report") == "report"
    assert pruner.role_of("ptb", "report") == "selection", "LLM-Pruner reports on PTB's validation split"
    for protocol in (gptq, pruner):
        for dataset in ("wikitext2", "ptb"):
            assert protocol.role_of(dataset, "selection") != protocol.role_of(dataset, "report")
