"""The prefix tree is used only where it gives the harness's numbers; elsewhere a fallback gives them, with its reason.

Every architecture is compared with lm-eval's own backend at batch size 1 (scoring) and with plain transformers, one
example at a time (training).
"""

import copy
import random

import pytest
import tiny_architectures as tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from coppice.models import packing
from coppice.models.prefix_tree import TreeForward, probe
from coppice.models.prefix_tree import architectures as known_kinds
from coppice.models.text_examples import IGNORED
from coppice.stages.evaluate import zero_shot
from coppice.stages.evaluate.zero_shot.harness_model import PrefixTreeLM

DEEP = {"num_hidden_layers": 32, "hidden_size": 128, "initializer_range": 0.6}  # rounding grows with the depth
LONGEST = 150  # tokens of the longest context: beyond every window and original context
TOLERANCE = 5e-5  # of a summed log-likelihood or loss, in nats, relative to its size above 1


def requests(longest=LONGEST, items=8):
    """Return requests whose contexts share a long preamble or none, short and long ones mixed."""
    rng = random.Random(0)

    def words(count):
        return " ".join(f"w{rng.randrange(3, 128)}" for _ in range(count))

    preamble, found = words(longest // 2), []
    for item in range(items):
        stem = (f"{preamble} " if item % 2 else "") + words(rng.randint(1, longest // 2))
        found += [Instance("loglikelihood", {}, (stem, f" {words(rng.randint(1, 9))}"), item) for _ in range(3)]
    return found


def log_likelihoods(model, tokenizer):
    """Return what the engine and the harness at batch size 1 give for some requests, and the engine."""
    asked = requests(min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST) - 10))
    engine = PrefixTreeLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, logits_cache=False)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (engine, harness))
    return [value for value, _ in found], [value for value, _ in expected], engine


def examples(longest):
    """Return training examples, half of them with a shared preamble; the prompt's tokens have no target."""
    rng = random.Random(1)
    preamble, found = rng.choices(range(10, 120), k=longest // 2), []
    for row in range(6):
        own = rng.choices(range(10, 120), k=rng.randint(5, longest // 2))
        ids = [*preamble, *own] if row % 2 else own
        found.append({"input_ids": ids, "labels": [IGNORED] * (len(ids) - 4) + ids[-4:], "row": row})
    return found


def losses(model, rows):
    """Return the summed loss of the engine, and of each row alone in a fresh pass of plain transformers."""
    engine, plain = packing.Engine(model, 400), 0.0
    with torch.no_grad():
        found = sum(float(engine.summed_loss(micro)) for micro in engine.micro_batches(rows))
        # the shortest first: dynamic NTK keeps the frequencies of the longest text so far
        for row in sorted(rows, key=lambda row: len(row["input_ids"])):
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            wanted = torch.tensor(row["labels"][1:])
            plain += float(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
    return found, plain, engine


@pytest.mark.parametrize("name", tiny.TREE)
def test_the_tree_gives_the_numbers_of_the_harness(name, tiny_tokenizer):
    model = tiny.build(name)
    found, expected, engine = log_likelihoods(model, tiny_tokenizer)
    assert engine.warnings == []
    assert engine.shares_prefixes
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    summed, plain, training = losses(model, examples(LONGEST))
    assert (training.arrangement, training.warnings) == ("tree", [])
    assert summed == pytest.approx(plain, rel=TOLERANCE)


@pytest.mark.parametrize("name", tiny.FALLBACK)
def test_a_fallback_gives_the_numbers_of_the_harness_and_its_reason(name, tiny_tokenizer):
    model, reason = tiny.build(name), tiny.FALLBACK[name][2]
    found, expected, engine = log_likelihoods(model, tiny_tokenizer)
    assert not engine.shares_prefixes
    assert reason in engine.warnings[0]
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    summed, plain, training = losses(model, examples(LONGEST))
    assert training.arrangement in ("sorted", "alone")
    assert reason in training.warnings[0]
    assert summed == pytest.approx(plain, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_the_harnesss_own_backend_also_runs_such_texts_one_by_one(name, tiny_tokenizer):
    lm = zero_shot.language_model(tiny.build(name), tiny_tokenizer, "lm-eval", 8)
    assert lm.batch_size == 1
    assert "one text at a time" in lm.warnings[0]


@pytest.mark.parametrize(("limit", "reason"), [(5000, "too long to probe"), (100_000, "")])
def test_an_architecture_that_is_not_listed_must_be_probed_beyond_its_limits(limit, reason, monkeypatch):
    """A limit that no text can reach does not matter."""
    monkeypatch.setattr(known_kinds, "EXACT", frozenset())
    model = copy.deepcopy(tiny.build("llama"))
    model.config.max_position_embeddings = 8192
    model.config.unknown_window = limit
    forward = TreeForward(model)
    found = probe.judge(forward, forward.known)
    assert reason in found.obstacle
    assert bool(found.obstacle) == found.alone == bool(reason)
    assert found.longest_row is not None  # no row of the engine is longer than the probe's


def test_code_of_a_checkpoint_is_not_trusted_by_the_name_of_its_architecture():
    kind = type("LlamaForCausalLM", (type(tiny.build("llama")),), {"__module__": "transformers_modules.own"})
    own = kind(tiny.build("llama").config)
    assert known_kinds.knowledge(tiny.build("llama")).listed
    assert not known_kinds.knowledge(own).listed


def test_every_listed_architecture_is_compared():
    assert {kind for kind, _ in tiny.TREE.values()} == known_kinds.EXACT


# The six models of config/full.yaml, each twice (base and instruct), and one more.
@pytest.mark.parametrize("name", ["llama-llama3", "qwen2", "mistral", "smollm3"])
def test_control_tokens_with_low_ids_do_not_turn_the_tree_off_in_bfloat16(name, tiny_tokenizer):
    """Rounding alone moves the states of such tokens by more than a fault of the tree moves those of words."""
    model = copy.deepcopy(tiny.build(name, **DEEP)).bfloat16()
    with torch.no_grad():
        model.get_input_embeddings().weight[:9] *= 100
        low = [[3, 1, 4, 1, 5, 2, 7, 2, 6], [3, 1, 4, 1, 5, 2, 8, 7], [6, 5, 3, 5, 8]]
        forward = TreeForward(model)
        alone = [forward.alone(text).float() for text in low]
        moved = max(float((a - b).norm() / b.norm()) for a, b in zip(forward.states(low), alone, strict=True))
    assert moved > 0.03  # so a probe with these tokens and a fixed tolerance turned the tree off
    engine = PrefixTreeLM(pretrained=model, tokenizer=tiny_tokenizer)
    assert engine.warnings == []
    assert packing.Engine(model, 400).arrangement == "tree"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as before the probe


@pytest.mark.parametrize("name", ["mpt", "gpt_neo", "rwkv", "jamba"])
def test_a_probe_alone_finds_a_fault_in_bfloat16(name, monkeypatch):
    """Without the table of known architectures, the probe must still see the fault below the rounding of bfloat16."""
    monkeypatch.setattr(known_kinds, "INEXACT", {})
    model = copy.deepcopy(tiny.build(name)).bfloat16()
    assert packing.Engine(model, 400).warnings
