"""Encoder-decoders: their examples, the loss and gradients of their engine, their answers, and their adapters."""

import pytest
import torch

from coppice import models
from coppice.core.errors import CoppiceError, SettingsError
from coppice.data import prompts
from coppice.models import footprint, kinds, sparsity, timing
from coppice.models.kinds import Decoding
from coppice.stages.recover import lora
from coppice.study.settings.sections.finetune import Lora
from tests.unit import tiny_seq2seq

KIND = kinds.named("seq2seq")
NAMES = tuple(tiny_seq2seq.ARCHITECTURES)


def rows(*pairs: tuple[str, str]):
    form = prompts.Formatter("pair", "none", tiny_seq2seq.tokenizer())
    return [row for source, target in pairs for row in form.rows({"input": source, "target": target}, "row")]


def examples(*pairs: tuple[str, str], cutoff: int = 64):
    reader = models.Reader(tiny_seq2seq.tokenizer())
    return [example for own in KIND.examples(rows(*pairs), reader, cutoff, False) for example in own]


def words(first: int, count: int) -> str:
    return " ".join(f"w{3 + (first + 7 * place) % 125}" for place in range(count))


PAIRS = [(words(place, 3 + 5 * place % 13), words(40 + place, 2 + 3 * place % 7)) for place in range(7)]


def test_a_source_ends_and_a_target_is_what_the_model_writes():
    (example,) = examples(("w5 w6", "w7"))
    assert example == {"input_ids": [5, 6, 2], "labels": [7, 2]}


def test_the_longer_one_of_source_and_target_is_cut_and_a_cut_source_still_ends():
    (example,) = examples((words(0, 20), "w7"), cutoff=8)
    assert len(example["input_ids"]) == 6 and example["input_ids"][-1] == 2 and example["labels"] == [7, 2]
    (example,) = examples(("w5", words(0, 20)), cutoff=8)
    assert example["input_ids"] == [5, 2] and len(example["labels"]) == 6 and 2 not in example["labels"]
    (example,) = examples((words(0, 20), words(0, 20)), cutoff=8)
    assert len(example["input_ids"]) == len(example["labels"]) == 4


def test_refuses_to_learn_what_the_encoder_reads():
    with pytest.raises(SettingsError, match=r"train_on_inputs: .* cannot learn them. Set it to false"):
        KIND.examples(rows(("w5", "w6")), models.Reader(tiny_seq2seq.tokenizer()), 64, True)


def loop_loss(model, made):
    """Return the mean loss of examples by transformers' own loss, one example at a time and without padding."""
    total = 0
    for example in made:
        ids = torch.tensor([example["input_ids"]])
        loss = model(input_ids=ids, labels=torch.tensor([example["labels"]])).loss
        total = total + loss * len(example["labels"])
    return total / sum(len(example["labels"]) for example in made)


def engine_loss(model, made, limit):
    engine = KIND.engine(model, limit)
    micro = list(engine.micro_batches(made))
    assert all(batch.tokens <= limit or len(micro) == len(made) for batch in micro)
    assert sum(len(batch.targets) for batch in micro) == KIND.targets(made)
    return sum(engine.summed_loss(batch) for batch in micro) / KIND.targets(made)


@pytest.mark.parametrize("limit", [10, 60, 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_a_loop_over_examples(name, limit):
    made = examples(*PAIRS)
    model, wide = tiny_seq2seq.build(name), tiny_seq2seq.build(name).double()
    expected = loop_loss(wide, made)
    expected.backward()
    found = engine_loss(model, made, limit)
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for (key, parameter), other in zip(model.named_parameters(), wide.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_a_bias_after_the_output_layer_counts():
    model, made = tiny_seq2seq.build("bart"), examples(*PAIRS)
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(engine_loss(model, made, 60), loop_loss(model, made), rtol=1e-5, atol=0)


def test_a_prefix_tree_is_refused_in_one_sentence():
    with pytest.raises(CoppiceError, match="Set it to sorted or null"):
        KIND.engine(tiny_seq2seq.build("t5"), 64, "tree")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_with_the_logits_that_were_saved(name, tmp_path):
    """FLAN-T5's output layer is a tensor of its own, although its configuration is read as if it were tied."""
    source = models.Source(str(tiny_seq2seq.save(tmp_path / "one", name)))
    once = models.load(source)
    models.save(once, source.reader(), tmp_path / "two")
    twice = models.load(models.Source(str(tmp_path / "two")))
    built = tiny_seq2seq.build(name)
    for probe in KIND.probes(built):
        assert KIND.outputs(built, probe).equal(KIND.outputs(once, probe))
        assert KIND.outputs(built, probe).equal(KIND.outputs(twice, probe))
    assert models.kind_of(source) is KIND
    assert models.count_parameters(tmp_path / "two") == sum(p.numel() for p in twice.parameters())


def test_counts_a_tied_tensor_once_and_an_output_layer_that_differs_besides(tmp_path):
    """The files of older T5 checkpoints hold the shared embedding under three names."""
    from safetensors.torch import load_file, save_file

    folder = tiny_seq2seq.save(tmp_path, "flan-t5")
    tensors = load_file(folder / "model.safetensors")
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone() for stack in ("encoder", "decoder")}
    save_file(tensors | copies, folder / "model.safetensors", {"format": "pt"})
    assert models.count_parameters(folder) == sum(p.numel() for p in tiny_seq2seq.build("flan-t5").parameters())


def test_in_float16_the_last_layer_of_an_mlp_stays_in_float32(tmp_path):
    folder = tiny_seq2seq.save(tmp_path, "flan-t5")
    kept = models.load(models.Source(str(folder), dtype="float16")).encoder.block[0].layer[-1].DenseReluDense
    assert (kept.wo.weight.dtype, kept.wi_0.weight.dtype) == (torch.float32, torch.float16)


def by_hand(model, source: str, new_tokens: int) -> str:
    """Return the greedy answer by full forward passes, one row at a time and without a cache."""
    tokenizer = tiny_seq2seq.tokenizer()
    ids, written = torch.tensor([tokenizer(source)["input_ids"]]), [model.config.decoder_start_token_id]
    for _ in range(new_tokens):
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == 2:
            break
    return tokenizer.decode(written[1:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
def test_answers_of_a_batch_are_the_greedy_ones_of_each_row_alone(name):
    model, reader = tiny_seq2seq.build(name), models.Reader(tiny_seq2seq.tokenizer())
    found = KIND.answers(model, reader, rows(*PAIRS), Decoding(new_tokens=6, batch_size=3))
    assert found == [by_hand(model, source, 6) for source, _ in PAIRS]
    assert len(set(found)) > 1


def test_draws_depend_on_the_seed_alone_and_leave_the_generator_as_it_was():
    model, reader = tiny_seq2seq.build("flan-t5"), models.Reader(tiny_seq2seq.tokenizer())

    def draw(seed: int) -> list[str]:
        return KIND.answers(model, reader, rows(*PAIRS), Decoding(sample=True, new_tokens=6, seed=seed))

    torch.manual_seed(5)
    before, one = torch.get_rng_state(), draw(1)
    assert torch.get_rng_state().equal(before)
    assert draw(1) == one != draw(2)


@torch.no_grad()
def test_beam_search_finds_the_likeliest_answer_of_two_tokens():
    model, tokenizer = tiny_seq2seq.build("flan-t5"), tiny_seq2seq.tokenizer()
    ids = torch.tensor([tokenizer(PAIRS[1][0])["input_ids"]]).expand(128, -1)
    firsts = torch.stack([torch.zeros(128, dtype=torch.long), torch.arange(128)], 1)
    logits = model(input_ids=ids, decoder_input_ids=firsts, use_cache=False).logits.log_softmax(-1)
    both = logits[0, 0, :, None] + logits[:, 1]  # [first token, second token]
    both[2] = -torch.inf  # the first token is no end
    best = divmod(int(both.argmax()), 128)
    decoding = Decoding(beams=128, new_tokens=2)
    (found,) = KIND.answers(model, models.Reader(tokenizer), rows(PAIRS[1]), decoding)
    assert found == tokenizer.decode(best, skip_special_tokens=True)
    assert best[0] != int(logits[0, 0].argmax()), "greedy decoding would find it, too"


def chosen(name: str, wanted) -> set[str]:
    model = tiny_seq2seq.build(name)
    adapted = lora._with_adapter(model, KIND, resolved(wanted))
    return {key.partition(".lora_A")[0] for key, _ in adapted.base_model.model.named_parameters() if "lora_A" in key}


def resolved(wanted) -> Lora:
    return Lora(r=2, alpha=4, dropout=0.0, target_modules=wanted, bias="none", use_rslora=False, use_dora=False)


@pytest.mark.parametrize(
    ("name", "wanted", "suffixes", "count"),
    [
        ("flan-t5", "attention", {"q", "k", "v", "o"}, 4 * (3 + 2 * 3)),
        ("flan-t5", "mlp", {"wi_0", "wi_1", "wo"}, 3 * 6),
        ("t5", "mlp", {"wi", "wo"}, 2 * 6),
        ("flan-t5", "cross-attention", {"q", "k", "v", "o"}, 4 * 3),
        ("flan-t5", ["q", "v"], {"q", "v"}, 2 * 9),
        ("bart", "self-attention", {"q_proj", "k_proj", "v_proj", "out_proj"}, 4 * 6),
        ("bart", ["cross-attention", "mlp"], {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 4 * 3 + 2 * 6),
    ],
)
def test_an_adapter_takes_the_layers_of_its_group(name, wanted, suffixes, count):
    found = chosen(name, wanted)
    assert {key.rpartition(".")[2] for key in found} == suffixes and len(found) == count
    if wanted == "cross-attention":
        assert all(".EncDecAttention." in key for key in found)


def test_a_frozen_encoder_gets_no_adapter_and_the_cross_attention_belongs_to_the_decoder():
    settings = resolved(["q", "v"]).model_copy(update={"towers": {"encoder": "frozen"}})
    adapted = lora._with_adapter(tiny_seq2seq.build("flan-t5"), KIND, settings)
    found = {key for key, _ in adapted.base_model.model.named_parameters() if "lora_A" in key}
    assert all(key.startswith("decoder.") for key in found) and len(found) == 2 * 6


def test_a_name_that_matches_nothing_is_refused():
    with pytest.raises(SettingsError, match=r"'q_proj' matches no linear layer of a T5ForConditionalGeneration"):
        chosen("flan-t5", ["q_proj"])


def test_a_merged_adapter_gives_the_outputs_of_the_adapter_beside_the_weights(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    folder = tiny_seq2seq.save(tmp_path / "base", "flan-t5")
    adapted = lora._with_adapter(models.load(models.Source(str(folder))), KIND, resolved("attention"))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, 0, 0.1)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    (probe, *_), model = KIND.probes(adapted), models.load(models.Source(str(folder)), tmp_path / "adapter")
    expected = KIND.outputs(adapted, probe)
    assert KIND.outputs(model, probe).equal(expected)
    merged = sparsity.merge(model, True)
    torch.testing.assert_close(KIND.outputs(merged, probe), expected, rtol=1e-4, atol=1e-4)
    plain = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(KIND.outputs(plain, probe), expected, rtol=1e-6, atol=1e-6)


def test_macs_are_those_of_one_token_of_the_source_and_one_of_the_target():
    model = tiny_seq2seq.build("flan-t5")
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert footprint.measure(model)["linear_macs"] == linears


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
@torch.no_grad()
def test_steps_that_are_timed_are_those_of_generation_with_caches(name):
    model, ids = tiny_seq2seq.build(name), torch.tensor([[5, 6, 7, 2]])
    output, written = model(**KIND.timed_inputs(model, ids, None), use_cache=True), [5]
    for _ in range(3):
        token = output.logits[:, -1:].argmax(-1)
        written.append(int(token))
        output = model(**KIND.timed_inputs(model, token, output), use_cache=True)
        whole = model(input_ids=ids, decoder_input_ids=torch.tensor([written]), use_cache=False).logits
        torch.testing.assert_close(output.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)
    assert len(timing.run(model, 2, 8, 3)[1]) == 3
