"""Continuations in batches: each answer is what its prompt gives alone, and ends where it must."""

from dataclasses import replace

import pytest
import torch

from coppice import models
from coppice.data import prompts
from coppice.models import continuing
from coppice.models.causal_lm import KIND
from coppice.models.kinds import Decoding
from tests.unit import tiny_architectures
from tests.unit.test_infilling import QWEN, TOKENIZERS

QUESTIONS = [[5 + (seed * 7 + place * 3) % 100 for place in range(2 + 5 * seed)] for seed in range(6)]


class Words:
    """A stand-in for a tokenizer whose tokens are numbers."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def greedy(model, ids, count, ends=()):
    """Return the likeliest continuation, by a pass over the whole text for each token."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] not in ends:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return [token for token in ids[start:] if token not in ends]


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mistral-window", "gemma2", "starcoder2", "gpt_neox", "mamba", "bloom"]
)
def test_answers_in_a_batch_are_those_of_each_prompt_alone(name):
    model = tiny_architectures.build(name)
    model.generation_config.eos_token_id = None
    found = continuing.continuations(
        model, Words(), [continuing.Question(ids) for ids in QUESTIONS], Decoding(new_tokens=8), 256
    )
    assert found == [" ".join(map(str, greedy(model, ids, 8, ends=[2]))) for ids in QUESTIONS]


def test_a_model_that_sees_its_padding_runs_prompts_of_one_length_at_a_time(monkeypatch):
    model = tiny_architectures.build("llama")
    forward, sizes = model.forward, []

    def blind(input_ids=None, attention_mask=None, position_ids=None, **options):
        """Run the model without a mask and with positions from the first place on."""
        sizes.append(None if attention_mask is None else int((attention_mask == 0).sum()))
        return forward(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(model, "forward", blind)
    assert not continuing._padding_is_exact(model)
    monkeypatch.setattr(model, "forward", forward)
    assert continuing._padding_is_exact(model)


def test_beams_and_draws_are_those_of_transformers():
    model = tiny_architectures.build("llama")
    model.generation_config.eos_token_id = None
    ids = QUESTIONS[3]
    for decoding in (Decoding(beams=3, new_tokens=6), Decoding(sample=True, new_tokens=6, seed=3, temperature=2.0)):
        torch.manual_seed(3)
        drawn = {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 0} if decoding.sample else {}
        expected = model.generate(
            torch.tensor([ids]), num_beams=decoding.beams, max_new_tokens=6, eos_token_id=2, pad_token_id=0, **drawn
        )[0, len(ids) :].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        before = torch.random.get_rng_state()
        found = continuing.continuations(model, Words(), [continuing.Question(ids)], decoding, 256)
        assert found == [" ".join(map(str, expected))]
        assert torch.equal(before, torch.random.get_rng_state())


def test_a_prompt_that_fills_the_context_has_no_answer_and_one_near_its_end_a_short_one():
    model = tiny_architectures.build("llama")
    asked = [continuing.Question([7] * length) for length in (256, 253, 4, 0)]
    found = continuing.continuations(model, Words(), asked, Decoding(new_tokens=8), 256)
    assert found[0] is None and found[3] is None
    assert found[1] == " ".join(map(str, greedy(model, [7] * 253, 3, ends=[2])))
    assert found[2] == " ".join(map(str, greedy(model, [7] * 4, 8, ends=[2])))


def test_an_answer_keeps_the_spaces_that_its_tokenizer_drops_at_the_beginning_of_a_text():
    class Dropping(Words):
        def decode(self, ids, skip_special_tokens):
            return "".join(f" {token}" for token in ids).removeprefix(" ")

    assert continuing._decoded(Dropping(), [5, 6], [7, 8]) == " 7 8"


def code_model():
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[QWEN]
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval(), models.Reader(tokenizer)


def infilled(model, reader, rows, decoding):
    formatter = prompts.Formatter("fim", "none", reader.tokenizer)
    return KIND.answers(model, reader, [formatter.question(row, "row") for row in rows], decoding)


ROWS = [{"prefix": f"def f{'x' * place}(a):\n", "middle": "pass", "suffix": "\n" * place} for place in range(5)]


def test_infilled_answers_end_at_control_tokens_stop_texts_and_line_ends():
    model, reader = code_model()
    tokenizer, decoding = reader.tokenizer, Decoding(new_tokens=30)
    whole = infilled(model, reader, ROWS, decoding)
    assert whole == [infilled(model, reader, [row], replace(decoding, batch_size=1))[0] for row in ROWS]
    # a letter that the model writes early is a stop text, then the end of a line, then a control token
    stop = whole[0][1]
    assert (
        infilled(model, reader, ROWS[:1], replace(decoding, stop=(stop,)))[0]
        == whole[0][: whole[0].index(stop)].strip()
    )
    with torch.no_grad():
        bias = torch.zeros(len(tokenizer))
        bias[tokenizer.convert_tokens_to_ids("<|file_sep|>")] = 1e3
        model.lm_head.bias = torch.nn.Parameter(bias)
    assert infilled(model, reader, ROWS, decoding) == [""] * len(ROWS)
    newline, letter = tokenizer("\n").input_ids[-1], tokenizer("q").input_ids[-1]
    state = {"count": 0}

    def alternating(module, arguments, output):
        state["count"] += 1
        output = torch.full_like(output, -1e3)
        output[..., letter if state["count"] % 3 else newline] = 0
        return output

    model.lm_head.register_forward_hook(alternating)
    state["count"] = 0
    line = infilled(model, reader, [ROWS[0] | {"kind": "line"}], decoding)[0]
    state["count"] = 0
    lines = infilled(model, reader, [ROWS[0] | {"kind": "lines"}], decoding)[0]
    assert line and set(line) == {"q"} and lines.split("\n")[0] == line and "\n" in lines


def test_a_question_that_is_too_long_leaves_room_for_the_answer():
    model, reader = code_model()
    row = {"prefix": "p" * 200, "middle": "m", "suffix": "s" * 200}
    assert isinstance(infilled(model, reader, [row], Decoding(new_tokens=10))[0], str)
    formatter = prompts.Formatter("completion", "none", reader.tokenizer)
    rows = [formatter.question({"prompt": "p" * 200, "completion": "x"}, "row")]
    cut = [formatter.question({"prompt": "p" * 54, "completion": "x"}, "row")]
    decoding = Decoding(new_tokens=10)
    assert KIND.answers(model, reader, rows, decoding) == KIND.answers(model, reader, cut, decoding)


def test_a_model_that_has_learned_rows_fills_them_in():
    """What training puts before an answer is what the model is asked."""
    model, reader = code_model()
    rows = [{"prefix": f"a{n}(", "middle": f"{n}{n + 1}{n}", "suffix": ")\n", "kind": "line"} for n in range(3)]
    formatter = prompts.Formatter("fim", "none", reader.tokenizer)
    learned = [row for content in rows for row in formatter.rows(content, "row")]
    examples = [one for own in KIND.examples(learned, reader, 64, False) for one in own]
    engine, optimizer = KIND.engine(model, 1024), torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        for micro in engine.micro_batches(examples):
            (engine.summed_loss(micro) / KIND.targets(examples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert infilled(model, reader, rows, Decoding(new_tokens=10)) == [row["middle"] for row in rows]
