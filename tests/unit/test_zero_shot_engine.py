"""The prefix-tree engine compared with lm-eval's own backend, which runs each request alone at batch size 1."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from coppice import models
from coppice.core.errors import DataError, SettingsError
from coppice.models import output_head
from coppice.models.prefix_tree import TreeForward, trie
from coppice.stages.evaluate import zero_shot
from coppice.stages.evaluate.zero_shot.harness_model import PrefixTreeLM
from coppice.stages.evaluate.zero_shot.merged_tokens import CheckedLM

TOLERANCE = 1e-3


def words(rng, count):
    return " ".join(f"w{rng.randrange(3, 128)}" for _ in range(count))


def instances(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]


def multiple_choice(seed=0, items=12, context=(1, 60), ending=(1, 9)):
    """Return (context, continuation) pairs of items with four choices each; some contexts share their beginning."""
    rng = random.Random(seed)
    shared = words(rng, context[1] // 3)
    pairs = []
    for item in range(items):
        stem = (shared + " " if item % 3 == 0 else "") + words(rng, rng.randint(*context))
        pairs += [(stem, " " + words(rng, rng.randint(*ending))) for _ in range(4)]
    return pairs


def harness(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, logits_cache=False)


def assert_agree(model, tokenizer, pairs, reference=None):
    """Check that the engine, without falling back, gives what lm-eval gives for `reference` or else the same model."""
    engine = PrefixTreeLM(pretrained=model, tokenizer=tokenizer)
    assert engine.shares_prefixes
    found = engine.loglikelihood(instances(pairs), disable_tqdm=True)
    expected = harness(reference or model, tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=TOLERANCE)
        assert greedy == wanted_greedy


def greedy_continuation(model, tokenizer, context, length):
    ids = torch.tensor([tokenizer.encode(context)])
    for _ in range(length):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return " " + tokenizer.decode(ids[0, -length:])


def lora(model, targets, seed=3):
    """Return `model` with a LoRA adapter on `targets` that changes its output a lot."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return adapted.eval()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attn_implementation": "eager"}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"mlp_bias": True, "attention_bias": True}),
        ("qwen2", {}),
        ("qwen2", MIXED),
        ("qwen2", MIXED | {"attn_implementation": "eager"}),
        ("qwen3", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 7}),
        ("mistral", {"sliding_window": 7, "attn_implementation": "eager"}),
    ],
)
def test_log_likelihoods_equal_those_of_lm_eval(tiny_model, tiny_tokenizer, architecture, overrides):
    model = tiny_model(architecture, **overrides)
    assert_agree(model, tiny_tokenizer, multiple_choice())


def test_scores_layers_of_different_widths(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    for index, layer in enumerate(model.model.layers):
        keep = 48 - 8 * index
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[:keep].clone())
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :keep].clone())
    assert_agree(model, tiny_tokenizer, multiple_choice())


@pytest.mark.parametrize("targets", [LINEAR, ["lm_head"], [*LINEAR, "lm_head"]])
def test_scores_a_merged_and_an_unmerged_adapter(tiny_model, tiny_tokenizer, targets):
    pairs = multiple_choice()
    adapted = lora(tiny_model("qwen2"), targets)
    assert_agree(adapted, tiny_tokenizer, pairs)
    merged = lora(tiny_model("qwen2"), targets).merge_and_unload()
    assert_agree(merged, tiny_tokenizer, pairs, reference=adapted)
    plain = harness(tiny_model("qwen2"), tiny_tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    changed = PrefixTreeLM(pretrained=adapted, tokenizer=tiny_tokenizer).loglikelihood(instances(pairs))
    assert max(abs(a - b) for (a, _), (b, _) in zip(plain, changed, strict=True)) > 1


def test_scores_a_4_bit_base_as_lm_eval_does(tiny_checkpoint, tiny_tokenizer):
    """On the CPU, its matrix products are exact to float32, row by row."""
    model = models.load(models.Source(str(tiny_checkpoint("llama")), quantize="4bit"))
    engine = PrefixTreeLM(pretrained=model, tokenizer=tiny_tokenizer)
    assert engine.shares_prefixes
    pairs = instances(multiple_choice())
    expected = harness(model, tiny_tokenizer).loglikelihood(pairs, disable_tqdm=True)
    found = engine.loglikelihood(pairs)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=2e-2)


@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 7}])
def test_truncates_on_the_left_a_context_longer_than_the_models(tiny_model, tiny_tokenizer, overrides):
    model = tiny_model("mistral" if overrides else "llama", max_position_embeddings=40, **overrides)
    assert_agree(model, tiny_tokenizer, multiple_choice(context=(30, 90)))


def test_scores_continuations_of_every_length(tiny_model, tiny_tokenizer):
    rng = random.Random(1)
    stem, long = words(rng, 20), " " + words(rng, 200)
    pairs = [
        ("", "w5 w6 w7"),  # an empty context is replaced by the BOS token
        ("", "w9"),
        ("w5", " w6 w7"),
        (stem, " w8"),
        (stem, " w9"),
        (stem, " w9 w10"),  # it begins with the choice before
        (stem, " w9 w10 w11"),
        (stem, long),
        (stem + long, " w12"),  # the same tokens, split at another place
        (stem + "  ", "w13"),  # spaces at the end of the context
        (stem, " w9 w10"),  # the same request twice
        (stem, " w9 w10"),
    ]
    assert_agree(tiny_model("llama"), tiny_tokenizer, pairs)


def test_recognizes_a_greedy_continuation(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    pairs = []
    for context, _ in multiple_choice()[::4]:
        likely = greedy_continuation(model, tiny_tokenizer, context, 4)
        if "w3" in likely:  # the unknown token, which the tokenizer also finds at the beginning of w30 to w39
            continue
        pairs += [(context, likely), (context, likely + " w77 w78")]
    assert_agree(model, tiny_tokenizer, pairs)
    answers = PrefixTreeLM(pretrained=model, tokenizer=tiny_tokenizer).loglikelihood(instances(pairs))
    assert len(answers) > 10
    assert all(greedy for _, greedy in answers[::2])


def test_scores_a_model_that_caps_its_logits_from_full_logits(tiny_model, tiny_tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=1.0,
        sliding_window=7,
        initializer_range=0.3,
        attn_implementation="eager",
        max_position_embeddings=256,
    )
    model = Gemma2ForCausalLM(config).eval()
    assert output_head.parts(model) == (None, None)
    assert_agree(model, tiny_tokenizer, multiple_choice())


def test_leaves_a_model_that_ignores_the_mask_to_lm_eval(tiny_tokenizer, caplog):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    engine = PrefixTreeLM(pretrained=model, tokenizer=tiny_tokenizer, max_length=200)
    assert not engine.shares_prefixes
    assert "lm-eval's own backend" in caplog.text
    assert "carries a state" in caplog.text
    pairs = multiple_choice(items=3)
    expected = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1, max_length=200)
    assert engine.loglikelihood(instances(pairs)) == expected.loglikelihood(instances(pairs))


def test_detects_a_model_that_ignores_positions(tiny_model, tiny_tokenizer):
    """The probe compares with plain runs, so a model that uses the mask but ignores the positions must fail it."""
    model = tiny_model("llama")
    whole = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **options: whole(*args, **options)
    assert not PrefixTreeLM(pretrained=model, tokenizer=tiny_tokenizer).shares_prefixes


def test_rejects_a_request_without_a_log_likelihood(tiny_model, tiny_tokenizer):
    engine = PrefixTreeLM(pretrained=tiny_model("llama", max_position_embeddings=16), tokenizer=tiny_tokenizer)
    for pair, reason in ((("w5", ""), "no tokens"), (("w5", " w6" * 17), "17 tokens, .*context is 16")):
        with pytest.raises(DataError, match=reason):
            engine.loglikelihood(instances([pair]))


def test_whole_texts_and_generation_equal_those_of_lm_eval(tiny_model, tiny_tokenizer):
    model = tiny_model("llama", max_position_embeddings=32)
    engine, reference = PrefixTreeLM(pretrained=model, tokenizer=tiny_tokenizer), harness(model, tiny_tokenizer)
    rng = random.Random(2)
    texts = instances([(words(rng, n),) for n in (5, 31, 32, 100)], "loglikelihood_rolling")
    found = engine.loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(reference.loglikelihood_rolling(texts, disable_tqdm=True), abs=TOLERANCE)
    prompts = instances([("w5 w6", {"until": ["w9"], "max_gen_toks": 8}), ("w7", {"until": [], "max_gen_toks": 5})])
    assert engine.generate_until(prompts) == reference.generate_until(prompts)
    chat = [{"role": "user", "content": "w20 w21"}]
    assert engine.apply_chat_template(chat) == reference.apply_chat_template(chat)


def test_lm_eval_builds_the_engine_from_a_checkpoint_folder(tiny_checkpoint, tiny_model, tiny_tokenizer):
    from lm_eval.api.registry import get_model

    folder = tiny_checkpoint("mistral")
    built = get_model("coppice").create_from_arg_string(f"pretrained={folder},dtype=float32", {"batch_size": 2})
    pairs = multiple_choice(items=2)
    expected = harness(tiny_model("mistral"), tiny_tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    found = built.loglikelihood(instances(pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=TOLERANCE)
    with pytest.raises(SettingsError, match="did you mean 'max_length'"):
        PrefixTreeLM(pretrained=str(folder), max_lenght=5)


def test_loads_an_adapter_folder_onto_the_checkpoint(tiny_checkpoint, tiny_model, tiny_tokenizer, tmp_path):
    adapted = lora(tiny_model("llama"), LINEAR)
    adapted.save_pretrained(tmp_path)
    engine = PrefixTreeLM(pretrained=str(tiny_checkpoint("llama")), peft=str(tmp_path), dtype="auto")
    pairs = multiple_choice(items=2)
    expected = harness(adapted, tiny_tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    assert engine.loglikelihood(instances(pairs))[0][0] == pytest.approx(expected[0][0], abs=TOLERANCE)


def test_the_setting_chooses_the_engine(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    assert isinstance(zero_shot.language_model(model, tiny_tokenizer, "prefix-tree", 4), PrefixTreeLM)
    own = zero_shot.language_model(model, tiny_tokenizer, "lm-eval", 4)
    assert (type(own), own.batch_size, own.warnings) == (CheckedLM, 4, [])


def test_stores_answers_in_the_cache_of_lm_eval(tiny_model, tiny_tokenizer):
    kept = {}

    class Hook:
        def add_partial(self, kind, key, answer):
            kept[kind, key] = answer

    engine = PrefixTreeLM(pretrained=tiny_model("llama"), tokenizer=tiny_tokenizer)
    engine.set_cache_hook(Hook())
    pairs = multiple_choice(items=2)
    answers = engine.loglikelihood(instances(pairs))
    assert kept == {("loglikelihood", pair): answer for pair, answer in zip(pairs, answers, strict=True)}


def test_out_of_memory_halves_the_batches_and_changes_no_answer(tiny_model, tiny_tokenizer, monkeypatch, caplog):
    engine = PrefixTreeLM(pretrained=tiny_model("llama"), tokenizer=tiny_tokenizer)
    pairs = instances(multiple_choice(context=(40, 80)))
    expected = engine.loglikelihood(pairs)
    whole, sizes = TreeForward.run, []

    def scarce(self, ids, **options):
        sizes.append(ids.numel())
        if ids.numel() > 130:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, ids, **options)

    monkeypatch.setattr(TreeForward, "run", scarce)
    assert [value for value, _ in engine.loglikelihood(pairs)] == pytest.approx([value for value, _ in expected])
    assert "out of memory" in caplog.text
    assert sizes[-1] <= 130 < max(sizes)


def test_only_the_first_of_equal_logits_is_greedy(monkeypatch):
    """As with argmax, within a tile of the vocabulary and across tiles."""
    monkeypatch.setattr(output_head, "CPU_TILE", 256)  # tiles of 256
    head = torch.nn.Linear(4, 600, bias=False)
    torch.nn.init.zeros_(head.weight)
    head.weight.data[[10, 20, 300]] = 1.0
    hidden, targets = torch.ones(1, 4), torch.tensor([10, 20, 300, 599, 10])
    with torch.no_grad():
        value, greedy = output_head.score(head, hidden, torch.zeros(5, dtype=torch.long), targets)
        expected = head(hidden).log_softmax(-1)[0, targets]
    assert greedy.tolist() == [True, False, False, False, True]
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_tiled_output_layer_equals_log_softmax(monkeypatch, bias, scale):
    monkeypatch.setattr(output_head, "CPU_TILE", 256)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 1000, bias=bias), torch.randn(9, 16) * scale
    rows, targets = torch.randint(9, (40,)), torch.randint(1000, (40,))
    rows[:9], targets[:9] = torch.arange(9), head(hidden).argmax(-1)
    with torch.no_grad():
        value, greedy = output_head.score(head, hidden, rows, targets)
        logits = head(hidden).double()
    torch.testing.assert_close(value.double(), logits.log_softmax(-1)[rows, targets], rtol=1e-5, atol=1e-4)
    assert greedy.tolist() == (logits.argmax(-1)[rows] == targets).tolist()


sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=25)


@given(sequences)
@settings(deadline=None)
def test_the_path_of_a_request_holds_its_tokens(requests):
    tree, paths = trie.build(requests)
    assert len(tree) == len({tuple(request[: i + 1]) for request in requests for i in range(len(request))})
    for request, path in zip(requests, paths, strict=True):
        assert tree.token[path].tolist() == request
        assert tree.depth[path].tolist() == list(range(len(request)))
        above = [j for j in range(len(tree)) if j <= path[-1] < tree.end[j]]
        assert path.tolist() == above == [*tree.ancestors(path[-1]).tolist(), path[-1]]


@given(sequences, st.integers(1, 40), st.integers(1, 60))
@settings(deadline=None)
def test_rows_hold_every_node_once_with_all_its_ancestors(requests, limit, crossover):
    tree, _ = trie.build(requests)
    rows = trie.rows(tree, limit, crossover)
    assert [node for row in rows for node in range(row.start, row.stop)] == list(range(len(tree)))
    for row in rows:
        assert row.lead == tree.depth[row.start]
        inside = {*tree.ancestors(row.start).tolist(), *range(row.start, row.stop)}
        assert len(inside) == len(row)
        assert all(inside.issuperset(tree.ancestors(node).tolist()) for node in range(row.start, row.stop))
        within = (tree.cuts > row.start) & (tree.cuts < row.stop)
        assert len(row) <= limit or not within.any()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 100))
@settings(deadline=None)
def test_batches_hold_each_row_once_and_keep_to_the_token_limit(lengths, token_limit):
    rows = [trie.Row(i, i + n, 0) for i, n in enumerate(lengths)]
    batches = trie.batches(rows, token_limit)
    longest = [max(map(len, batch)) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert all(len(batch) * length <= max(token_limit, length) for batch, length in zip(batches, longest, strict=True))
    assert sorted(row.start for batch in batches for row in batch) == list(range(len(rows)))
