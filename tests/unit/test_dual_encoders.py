"""Dual encoders: the contrastive loss, its gradients in micro-batches and processes, and their embeddings."""

import math
import multiprocessing

import pytest
import torch

from coppice import models
from coppice.core.errors import CheckpointError
from coppice.models import contrastive, kinds
from coppice.models.rows import Row, Segment
from tests.unit import tiny_dual_encoders as tiny

KIND = kinds.named("dual-encoder")
FAMILIES = ["clip", "metaclip", "siglip"]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    return models.Source(str(tiny.save(request.param, tmp_path_factory.mktemp(request.param))))


def rows(pairs):
    return [
        Row([Segment(text, True)], True, True, False, {}, references=(text,), pictures=(tiny.Picture(number),))
        for text, number in pairs
    ]


DISTINCT = [(text, number) for number, text in enumerate(tiny.WORDS[:12])]
# a caption of two pictures, a picture with two captions, a pair that is there twice
REPEATED = [*DISTINCT[:6], (tiny.WORDS[0], 20), ("big red bar", 1), ("white ring", 1), DISTINCT[3], ("white ring", 30)]


def examples(source, pairs):
    return [one for own in KIND.examples(rows(pairs), source.reader(), 77, False) for one in own]


def loss_and_gradients(model, found, limit):
    engine = KIND.engine(model, limit)
    model.zero_grad()
    micro = list(engine.micro_batches(found))
    total = 0.0
    for part in micro:
        loss = engine.summed_loss(part) / KIND.targets(found)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(micro)


def independent(model, found, pairs):
    """The loss in float64 with a loop over pairs, from transformers' own logits and the repeated captions."""
    inputs = contrastive.inputs_of(found)
    logits = model(**inputs).logits_per_text.double()
    described = set(pairs)
    total = 0.0
    for i, (text, _) in enumerate(pairs):
        others = [j for j, (_, picture) in enumerate(pairs) if j == i or (text, picture) not in described]
        asked = [j for j, (other, _) in enumerate(pairs) if j == i or (other, pairs[i][1]) not in described]
        if hasattr(model, "logit_bias"):
            signs = torch.tensor([1.0 if j == i else -1.0 for j in others], dtype=torch.float64)
            total += -torch.log(1 / (1 + torch.exp(-signs * logits[i, others]))).sum()
        else:
            by_text = -logits[i, i] + torch.log(torch.exp(logits[i, others]).sum())
            by_picture = -logits[i, i] + torch.log(torch.exp(logits[asked, i]).sum())
            total += (by_text + by_picture) / 2
    return total / len(pairs)


def test_the_loss_of_distinct_captions_is_that_of_transformers(source):
    model, found = models.load(source, train=True), examples(source, DISTINCT)
    expected = model(**contrastive.inputs_of(found), return_loss=True).loss.item()
    for limit in (10_000, 30):
        assert loss_and_gradients(model, found, limit)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pairs", [DISTINCT, REPEATED], ids=["distinct", "repeated"])
def test_micro_batches_have_the_gradient_of_the_one_big_batch_and_of_a_loop_in_float64(source, pairs):
    model, found = models.load(source, train=True).double(), examples(source, pairs)
    big, whole, one = loss_and_gradients(model, found, 10_000)
    small, parts, several = loss_and_gradients(model, found, 30)
    assert one == 1 and several > 3
    model.zero_grad()
    loss = independent(model, found, pairs)
    loss.backward()
    assert big == pytest.approx(small, rel=1e-10) and big == pytest.approx(loss.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(parts[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_both_runs_of_a_micro_batch_have_the_same_dropout(tmp_path):
    source = models.Source(str(tiny.save("clip", tmp_path, dropout=0.5)))
    model, found = models.load(source, train=True), examples(source, DISTINCT)
    engine = KIND.engine(model, 30)
    for micro in engine.micro_batches(found):
        again = engine.forward  # embeds with the same random numbers, whatever was drawn in between
        torch.manual_seed(99)
        first = micro.run(again)
        torch.manual_seed(7)
        assert torch.equal(first, micro.run(again))
    torch.manual_seed(5)
    one, _, several = loss_and_gradients(model, found, 30)
    torch.manual_seed(5)
    assert loss_and_gradients(model, found, 30)[0] == one and several > 1
    torch.manual_seed(6)
    assert loss_and_gradients(model, found, 30)[0] != one


def test_validation_gives_the_loss_of_each_pair_in_the_order_of_the_data(source):
    model, found = models.load(source), examples(source, REPEATED)
    engine = KIND.engine(model, 30)
    with torch.no_grad():
        total = sum(engine.summed_loss(micro).item() for micro in engine.micro_batches(found))
    assert len(list(engine.micro_batches(found))) > 3
    each = engine.example_losses(found)
    assert math.fsum(each) == pytest.approx(total, rel=1e-6)
    one, _, _ = loss_and_gradients(model, found, 10_000)
    assert math.fsum(each) / len(found) == pytest.approx(one, rel=1e-6)
    swapped = engine.example_losses(list(reversed(found)))
    assert list(reversed(swapped)) == pytest.approx(each, rel=1e-5)


def test_embeddings_are_those_of_transformers(source):
    reader, model = source.reader(), models.load(source)
    texts, pictures = list(tiny.WORDS[:5]), [tiny.Picture(number) for number in range(5)]
    pixels = reader.image_processor([picture.open() for picture in pictures], return_tensors="pt")["pixel_values"]
    ids = reader.tokenizer(texts, padding="max_length", max_length=tiny.TOKENS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(KIND.embeddings(model, reader, texts=texts), expected.text_embeds, rtol=0, atol=1e-6)
    found = KIND.embeddings(model, reader, pictures=pictures)
    torch.testing.assert_close(found, expected.image_embeds, rtol=0, atol=1e-6)


def test_a_tokenizer_that_ends_texts_otherwise_is_an_error(tmp_path):
    """CLIP would read every text's embedding at its first token, so that all texts are the same."""
    source = models.Source(str(tiny.save("clip", tmp_path)))
    model, reader = models.load(source), source.reader()
    model.config.text_config.eos_token_id = 5
    with pytest.raises(CheckpointError, match=r"ends a text with token 1, but .* at token 5\. Use the tokenizer"):
        KIND.embeddings(model, reader, texts=["big red disk"])


def in_two_processes(rank, folder, meeting, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    source = models.Source(folder)
    model, found = models.load(source, train=True), examples(source, REPEATED)
    engine = KIND.engine(model, 30)
    engine.gathers, own, total = True, found[rank::2] if rank else found[:1] + found[2::2], 0.0
    for part in engine.micro_batches(own):
        loss = engine.summed_loss(part) / len(found)
        loss.backward()
        total += loss.item()
    summed = [torch.tensor(total), *(p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())]
    for tensor in summed:
        torch.distributed.all_reduce(tensor)
    empty = list(engine.micro_batches(found if rank else []))  # a process without pairs takes part
    if not rank:
        torch.save((summed, len(empty)), results)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(source, tmp_path):
    options = source.path, tmp_path / "meeting", tmp_path / "out"
    context = multiprocessing.get_context("fork")  # of this process, which has loaded torch
    workers = [context.Process(target=in_two_processes, args=(rank, *options)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (total, *gradients), empty = torch.load(tmp_path / "out", weights_only=False)
    model = models.load(source, train=True)
    expected, whole, _ = loss_and_gradients(model, examples(source, REPEATED), 10_000)
    assert total.item() == pytest.approx(expected, rel=1e-6) and not empty
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
