"""Perplexity agrees with a ten-line float64 loop, and its windows with what the protocols define."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coppice import perplexity
from coppice.errors import DataError


def reference(model, ids, seq_len, bos=None):
    """Non-overlapping windows, one at a time, in float64; the incomplete last window is left out."""
    model = model.double()
    prefix = [] if bos is None else [bos]
    length = seq_len - len(prefix)
    losses = []
    for start in range(0, len(ids) - length + 1, length):
        window = torch.tensor([prefix + ids[start : start + length]])
        logits = model(input_ids=window).logits[0, :-1].log_softmax(-1)
        losses += (-logits[range(seq_len - 1), window[0, 1:]]).tolist()
    return math.exp(sum(losses) / len(losses)), len(losses)


ROWS = [" ".join(f"w{3 + (7 * i + j * j) % 125}" for j in range(40)) for i in range(30)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("bos", [False, True])
def test_it_agrees_with_a_float64_loop(tiny_model, tiny_tokenizer, architecture, bos):
    protocol = perplexity.Protocol("test", 64, 64, join={"": " "})
    result, windows = perplexity.measure(tiny_model(architecture), tiny_tokenizer, ROWS, "x", protocol, bos)
    ids = tiny_tokenizer(" ".join(ROWS), add_special_tokens=False)["input_ids"]
    value, tokens = reference(tiny_model(architecture), ids, 64, 1 if bos else None)
    assert result["value"] == pytest.approx(value, rel=1e-5)
    assert result["tokens"] == tokens == sum(window["tokens"] for window in windows)


def test_a_model_with_a_shorter_context_uses_its_own_length_and_says_so(tiny_model, tiny_tokenizer):
    result, _ = perplexity.measure(
        tiny_model("llama"), tiny_tokenizer, ROWS, "wikitext2", perplexity.PROTOCOLS["gptq-2048"]
    )
    assert result["protocol"]["seq_len"] == 256 and result["protocol"]["requested_seq_len"] == 2048


def test_a_text_shorter_than_a_window_is_one_window(tiny_model, tiny_tokenizer):
    result, windows = perplexity.measure(
        tiny_model("llama"), tiny_tokenizer, ["w5 w6 w7"], "x", perplexity.PROTOCOLS["gptq-2048"]
    )
    assert result["tokens"] == 2 and len(windows) == 1


def test_an_empty_text_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match="ptb"):
        perplexity.measure(tiny_model("llama"), tiny_tokenizer, [""], "ptb", perplexity.PROTOCOLS["gptq-2048"])


@given(length=st.integers(2, 300), seq_len=st.integers(3, 40), bos=st.booleans(), data=st.data())
def test_no_target_is_scored_twice_and_none_inside_is_left_out(length, seq_len, bos, data):
    width = seq_len - bos
    stride = data.draw(st.integers(1, width))
    ids = torch.arange(10, 10 + length)
    scored = []
    for piece, count, end in perplexity.windows(ids, seq_len, stride, 1 if bos else None):
        assert len(piece) <= seq_len and count <= len(piece) - 1
        scored += piece[len(piece) - count :].tolist()
        assert scored[-1] == end + 9
    assert len(scored) == len(set(scored))
    if stride < width and not bos:
        assert scored == list(range(scored[0], scored[-1] + 1))


def test_protocols_read_the_rows_and_joins_they_define():
    gptq, pruner = perplexity.PROTOCOLS["gptq-2048"], perplexity.PROTOCOLS["llmpruner-128"]
    assert (gptq.join_of("wikitext2"), gptq.join_of("ptb")) == ("\n\n", " ")
    assert (pruner.join_of("wikitext2"), pruner.join_of("ptb")) == ("\n\n", "\n\n")
    assert gptq.role_of("ptb", "report") == "report"
    assert pruner.role_of("ptb", "report") == "selection", "LLM-Pruner reports on PTB's validation split"
    for protocol in (gptq, pruner):
        for dataset in ("wikitext2", "ptb"):
            assert protocol.role_of(dataset, "selection") != protocol.role_of(dataset, "report")
