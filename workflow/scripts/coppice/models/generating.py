"""Generate answers in batches: rows of about equal length together, with progress in the log and a seed of their own.

The kinds of models that generate text use this; each prepares the inputs of a batch itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core import logs
from coppice.core.aliases import PathLike, Record
from coppice.core.json_text import parsed

from .kinds import Validator

if TYPE_CHECKING:
    import torch

    from .kinds import Decoding, LoadedModel, ModelKind
    from .readers import Reader
    from .rows import Row

# Keys of a checkpoint's generation_config.json that change which tokens it writes -> the value that changes nothing.
# `Decoding.options` sets the other ones.
OWN_SETTINGS = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "min_p")),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale")),
    **dict.fromkeys(("early_stopping", "renormalize_logits"), False),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), 0.0),
}


def in_batches(
    lengths: Sequence[int], decoding: Decoding, generate: Callable[[list[int]], list[str]], device: torch.device
) -> list[str]:
    """Return the answers to rows, in their order, cut at stop texts and without spaces around them.

    Args:
        lengths: the number of tokens of each row's question. The longest go first, so that a batch that does not fit in
            memory fails at once.
        decoding: how answers are generated. Random draws depend on its seed and on its batch size.
        generate: returns the answers to the rows with some indices.
        device: the model's.
    """
    import torch

    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    size = decoding.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    answers = [""] * len(lengths)
    drawn_on = [device] if device.type == "cuda" else []
    # without inference mode, whose tensors a training that goes on afterwards could not use
    with torch.no_grad(), torch.random.fork_rng(drawn_on, enabled=decoding.sample):
        if decoding.sample:
            torch.manual_seed(decoding.seed)
        for batch in logs.progress(batches, "answers", unit="batch"):
            for index, answer in zip(batch, generate(batch), strict=True):
                answers[index] = decoding.cut(answer)
    return answers


def settings_of(folder: PathLike) -> tuple[Record, Record]:
    """Return (settings, token ids) of a checkpoint itself that decide what it writes, besides `Decoding`.

    The settings are a repetition penalty, for instance, or a least length. Older checkpoints have them in config.json.
    """
    places = (Path(folder) / name for name in ("generation_config.json", "config.json"))
    path = next(path for path in places if path.is_file())
    found = parsed(path.read_text(encoding="utf-8"))
    own = {key: found[key] for key, usual in OWN_SETTINGS.items() if found.get(key) not in (None, usual)}
    ids = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    return own, {key: found[key] for key in ids if found.get(key) is not None}


def _answers(kind: ModelKind, model: LoadedModel, reader: Reader, rows: Sequence[Row], decoding: Decoding) -> list[str]:
    return kind.answers(model, reader, rows, decoding)


def _value(metric: str, answers: Sequence[str], rows: Sequence[Row]) -> float:
    from coppice.stats import text_metrics

    references = [row.references for row in rows]
    return text_metrics.score(metric, answers, references, text_metrics.form_of(rows[0].kind)).value


# what the best checkpoint of a model that generates answers may be chosen by, besides the loss
VALIDATORS = {
    metric: Validator(True, _answers, functools.partial(_value, metric))
    for metric in ("bleu4", "chrf", "exact_match", "token_f1", "edit_similarity")
}
