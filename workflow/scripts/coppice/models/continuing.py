"""Continue many prompts in batches, each as if it were alone.

Prompts of one batch are padded on the left. Where a trial shows that this changes a model's numbers, a batch holds
prompts of one length only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import generating, infilling, kinds
from .tokenizing import ends_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from .kinds import Decoding, Inputs, LoadedModel
    from .sight import Seen

# Differences of logits relative to the largest one, of which rounding makes at most a tenth, and a model that sees its
# padding much more
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
HALF_TOLERANCE = 0.05
SHORT, LONG = 5, 19  # tokens of the two prompts of the trial


@dataclass(frozen=True)
class Question:
    """What to continue.

    Attributes:
        ids: the token ids of the prompt.
        stop: texts at which the continuation ends, besides those of the decoding.
        infills: whether to end at the control tokens of infilling, too.
        seen: the pictures that the prompt mentions, for a model that sees.
    """

    ids: Sequence[int]
    stop: tuple[str, ...] = ()
    infills: bool = False
    seen: Seen | None = None


def continuations(
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    decoding: Decoding,
    context: int | None,
) -> list[str | None]:
    """Return the text that a model adds to each prompt, without spaces around it.

    It is None for a prompt that is empty or fills the context.

    Args:
        model: a decoder in eval mode.
        tokenizer: its tokenizer.
        questions: the prompts.
        decoding: how. Greedy and beam search give what each prompt gives alone, up to rounding; random draws depend on
            the seed and the batch.
        context: the tokens that the model was made for; None if that is not known.
    """
    found: list[str | None] = [None] * len(questions)
    ends, device = ends_of(model, tokenizer), model.get_input_embeddings().weight.device
    for places in _alike(model, questions, decoding, context):
        first = questions[places[0]]
        own = replace(decoding.stopping(first.stop), new_tokens=_room(first, decoding, context))
        every = [*ends, *_infilling_ends(tokenizer)] if first.infills else ends
        prompts = [questions[place] for place in places]

        def generate(
            batch: list[int],
            prompts: Sequence[Question] = prompts,
            own: Decoding = own,
            every: Sequence[int] = every,
        ) -> list[str]:
            rows = _generated(model, tokenizer, [prompts[place] for place in batch], own, every)
            kept = [row[: next((end for end, token in enumerate(row) if token in every), None)] for row in rows]
            return [_decoded(tokenizer, prompts[place].ids, row) for place, row in zip(batch, kept, strict=True)]

        answers = generating.in_batches([len(one.ids) for one in prompts], own, generate, device)
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    return found


def _decoded(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text of new tokens after a prompt. Some tokenizers drop a space at the beginning of a text."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (list(prompt), [*prompt, *new]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


def _room(question: Question, decoding: Decoding, context: int | None) -> int:
    """Return the number of tokens that may be generated."""
    return min(decoding.new_tokens, context - len(question.ids)) if context else decoding.new_tokens


def _alike(
    model: LoadedModel, questions: Sequence[Question], decoding: Decoding, context: int | None
) -> Iterator[list[int]]:
    """Yield the indices of the questions that may share batches: those that differ in their tokens alone."""

    def key(place: int) -> tuple[Any, ...]:
        question = questions[place]
        return question.stop, question.infills, _room(question, decoding, context), len(question.ids)

    places = [place for place, one in enumerate(questions) if one.ids and _room(one, decoding, context) > 0]
    lengths = {len(questions[place].ids) for place in places}
    mixes = len(lengths) < 2 or decoding.batch_size == 1 or _padding_is_exact(model)
    for _, group in itertools.groupby(sorted(places, key=key), key=lambda place: key(place)[: 3 if mixes else 4]):
        yield list(group)


def _generated(
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Question],
    decoding: Decoding,
    ends: Sequence[int],
) -> list[list[int]]:
    """Return the new tokens of each prompt, with what follows an end."""
    inputs = _padded(prompts, model)
    stopping = {"stopping_criteria": [_stopping(tokenizer, decoding.stop, inputs)]} if decoding.stop else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else None
    generated = model.generate(
        **inputs,
        **decoding.options(),
        **stopping,
        pad_token_id=pad,
        **({"eos_token_id": list(ends)} if ends else {}),
    )
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


def _stopping(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], inputs: Mapping[str, torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a criterion by which `generate` ends the rows whose new text contains a stop text.

    transformers' own `stop_strings` fails for tokenizers that cannot spell every letter.
    """
    import torch

    start = inputs["input_ids"].shape[1]
    window = max(len(text.encode()) for text in stop) + 1  # tokens in which a stop text that just ended began

    def ended(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        rows = ids[:, max(start, ids.shape[1] - window) :].tolist()
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return torch.tensor([any(one in text for one in stop) for text in texts], device=ids.device)

    return ended


def _padded(prompts: Sequence[Question], model: LoadedModel) -> Inputs:
    """Return prompts, padded on the left, with their mask and pictures."""
    import torch

    length = max(len(one.ids) for one in prompts)
    seen = [one.seen for one in prompts]
    # a padded place may hold any token but the one that says that there is a picture
    pad = 1 if any(one and one.token == 0 for one in seen) else 0
    ids = torch.tensor([[pad] * (length - len(one.ids)) + list(one.ids) for one in prompts])
    mask = torch.tensor([[0] * (length - len(one.ids)) + [1] * len(one.ids) for one in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(seen):
        from . import sight

        inputs |= sight.inputs(seen, ids)
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _padding_is_exact(model: LoadedModel) -> bool:
    """Return whether a prompt that is padded on the left has the logits that it has alone.

    A model whose numbers change with the length of a batch only beyond some length, as its configuration shows, is
    taken for one that is not.
    """
    import torch

    if kinds.of(model.config).lengths_interact(model):
        return False
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    long, short = (
        Question(torch.randint(vocabulary, (length,), generator=generator).tolist()) for length in (LONG, SHORT)
    )

    @torch.inference_mode()
    def logits(prompts: Sequence[Question]) -> torch.Tensor:
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
        output = model.generate(**_padded(prompts, model), **options, output_logits=True, return_dict_in_generate=True)
        return torch.stack(output.logits)[:, -1].float()  # of the last prompt: [2, vocabulary]

    alone, padded = logits([short])[0], logits([long, short])[0]
    tolerance = TOLERANCE.get(str(model.dtype).removeprefix("torch."), HALF_TOLERANCE)
    return bool((alone - padded).abs().max() <= tolerance * alone.abs().max())


def _infilling_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(infilling.tokens_of(tokenizer).ends))
