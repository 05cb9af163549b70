"""Perplexity under named protocols: exp of the mean negative log-likelihood per token, over windows of a joined text.

Numbers under different protocols cannot be compared, so each result states its protocol: the rows, how they were
joined, the window length, the stride, and where BOS is. The first token of a window has no context and is not scored.

`gptq-2048` is what GPTQ (Frantar et al. 2022, arXiv:2210.17323) and most later pruning papers report: WikiText2 test
joined by blank lines, PTB test joined by spaces, non-overlapping windows of 2048 tokens, without the incomplete last
window. `llmpruner-128` is LLM-Pruner's protocol (Ma et al. 2023, arXiv:2305.11627): WikiText2 test and PTB
*validation*, joined by blank lines, windows of 128 tokens. Both encode the whole text at once with the tokenizer's own
special tokens, so a Llama's text begins with one BOS, which is the first token of the first window. `shortened-llm-128`
(Kim et al. 2024, arXiv:2402.02834) has the text of `llmpruner-128`, and a BOS before the 128 tokens of every window.
The configuration may define others. A name that ends in `-v1` is what Coppice first measured under that name: no BOS.

Perplexity per token depends on the tokenizer, so models with different vocabularies are compared per word or per byte.
These divide the same summed loss by the number of words (runs of non-space, as Python's `str.split`) or UTF-8 bytes of
the *scored* text. A character belongs to the token that covers it (a space between two tokens, to the later one) and a
word to the token that covers its last character. The unscored first tokens of windows thus count neither in the loss
nor in the words and bytes.

The loss of each document is recorded too (see `documents`), because intervals resample documents.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from coppice import models
from coppice.core import logs
from coppice.core.aliases import Record
from coppice.core.errors import DataError
from coppice.models import kinds, tokenizing
from coppice.study.settings.sections.evaluate import Bos, Perplexity
from coppice.study.settings.sections.evaluate import Protocol as OwnProtocol

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import PreTrainedTokenizerBase

    from coppice.models.kinds import LoadedModel

Span = tuple[int, int]  # (begin, end) of a token in the characters of the text

logger = logging.getLogger("coppice.perplexity")

# The role to score candidates on instead of a protocol's own, so that selection never uses the rows of the reports.
OTHER_ROLE = {"report": "selection", "selection": "train", "train": "selection"}
LARGEST_EXPONENT = 700  # exp of larger values overflows a float


@dataclass(frozen=True)
class Protocol:
    """How a text becomes scored windows.

    `seq_len` and `stride` are in tokens. `join` and `role` map a dataset to its value, and '' to that of all others.
    `bos_counts` says whether the BOS of every window is one of its `seq_len` tokens. The record holds `version`, so
    that numbers of different versions are never compared.
    """

    name: str
    seq_len: int
    stride: int
    join: dict[str, str] = field(default_factory=lambda: {"": "\n\n"})
    role: dict[str, str] = field(default_factory=lambda: {"": "report"})
    bos: Bos = "none"
    bos_counts: bool = True
    version: int = 1

    @property
    def added(self) -> int:
        """The tokens of a window besides its `seq_len`."""
        return int(self.bos == "every-window" and not self.bos_counts)

    def join_of(self, dataset: str) -> str:
        """Return the string between two rows of `dataset`."""
        return self.join.get(dataset, self.join[""])

    def role_of(self, dataset: str, purpose: str) -> str:
        """Return the role of `dataset` to score: the protocol's own for the report, always another for selection."""
        report = self.role.get(dataset, self.role[""])
        return report if purpose == "report" else OTHER_ROLE[report]

    def facts(self, dataset: str, purpose: str = "report") -> Record:
        """Return everything that decides what is scored of `dataset`, for the key of a part."""
        return {
            "protocol": self.name,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "join": self.join_of(dataset),
            "role": self.role_of(dataset, purpose),
            "bos": self.bos,
            "bos_counts": self.bos_counts,
            "version": self.version,
            "by_document": True,  # parts that were stored before losses were recorded by document lack them
        }


BY_SPACES = {"": "\n\n", "ptb": " "}
ON_VALIDATION = {"": "report", "ptb": "selection"}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("gptq-2048", 2048, 2048, join=BY_SPACES, bos="once", version=2),
        Protocol("llmpruner-128", 128, 128, role=ON_VALIDATION, bos="once", version=2),
        Protocol("shortened-llm-128", 128, 128, role=ON_VALIDATION, bos="every-window", bos_counts=False),
        Protocol("gptq-2048-v1", 2048, 2048, join=BY_SPACES),
        Protocol("llmpruner-128-v1", 128, 128, role=ON_VALIDATION),
    )
}


def protocols(settings: Perplexity) -> list[Protocol]:
    """Return the list of `Protocol` to measure under. Reports and selection use the first one.

    settings: the section `evaluate.perplexity`.
    """
    names = settings.protocol
    found = [names] if isinstance(names, str) else names
    return [_protocol(name, settings.protocols.get(name), settings.bos) for name in found]


def _protocol(name: str, own: OwnProtocol | None, bos: Bos | None) -> Protocol:
    if own is None:
        return replace(PROTOCOLS[name], bos=bos or PROTOCOLS[name].bos)
    text = {"join": {"": own.join}, "role": {"": own.role}}
    begins = own.bos or bos or "none"
    return Protocol(name, own.seq_len, own.stride or own.seq_len, **text, bos=begins, bos_counts=own.bos_counts)


def encode(tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], join: str) -> torch.Tensor:
    """Return the token ids [T] of `rows` joined by `join`, without special tokens."""
    import torch

    ids = tokenizer(join.join(rows), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


class Window(NamedTuple):
    """Input ids [L], the number of scored targets (the last ones), and the window's end in the tokens of the text."""

    ids: torch.Tensor
    scored: int
    end: int


def windows(ids: torch.Tensor, length: int, stride: int, bos: int | None = None) -> Iterator[Window]:
    """Yield windows (`Window`) of token ids [T].

    Each window scores the targets that no earlier window scored. A text shorter than one window gives one window.

    Args:
        ids: LongTensor [T].
        length: tokens of text per window.
        stride: tokens between the starts of two windows.
        bos: id to put before the text of every window; None for none.
    """
    import torch

    starts = range(0, max(len(ids) - length, 0) + 1, stride) if len(ids) >= length else [0]
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    reached = 0
    for start in starts:
        piece = torch.cat([prefix, ids[start : start + length]])
        end = start + len(piece) - len(prefix)
        first = start + 1 if bos is None else start  # BOS is the context of the first token of text
        scored = end - max(first, reached)
        reached = end
        yield Window(piece, scored, end)


def measure(
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str],
    dataset: str,
    protocol: Protocol,
    split: str | None = None,
) -> tuple[Record, Record]:
    """Measure the perplexity of `rows` under `protocol`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: sequence of strings.
        dataset: name of the dataset, for the protocol and messages.
        protocol: a `Protocol`.
        split: name of the split, for the result.

    Returns:
        The result, {value, nll_per_token (nats), tokens (scored), windows, words and bytes (of the scored text),
        word_perplexity, byte_perplexity, bits_per_byte, documents, protocol}, and {window_losses, document_losses},
        lists of {nll_per_token, tokens}. The values per word and byte and the documents are None if the tokenizer does
        not give the positions of its tokens in the text; document_losses is also None for a text of one document.

    Raises:
        DataError: the text has too few tokens, or the tokenizer has no BOS token and needs one.
        CheckpointError: the perplexity is not finite.
    """
    every = protocol.bos == "every-window"
    if every and tokenizer.bos_token_id is None:
        raise DataError(
            "evaluate.perplexity.bos: is every-window, but the model's tokenizer has no BOS token. Set it to once or "
            "none."
        )
    join = protocol.join_of(dataset)
    facts: Record = {"name": protocol.name, "split": split, "join": join}
    facts |= _geometry(protocol, models.context_length(model), dataset)
    text = join.join(rows)
    ids, spans = _encode(tokenizer, text)
    if len(ids) < 2:
        raise DataError(
            f"dataset {dataset}: its text has {len(ids)} tokens, but perplexity needs at least 2. Name a longer text."
        )
    if protocol.bos == "once" and tokenizing.begins_with_bos(tokenizer):
        ids, spans = _with_bos(tokenizer.bos_token_id, ids, spans)
    first = tokenizer.bos_token_id if every else None
    pieces = list(windows(ids, facts["seq_len"] + protocol.added - every, facts["stride"], first))
    scored = _token_losses(model, pieces, f"perplexity {dataset}")
    losses = [float(window.mean()) for window in scored]
    tokens = sum(piece.scored for piece in pieces)
    total = math.fsum(loss * piece.scored for loss, piece in zip(losses, pieces, strict=True))
    value = _exp(total / tokens) or math.inf
    if not math.isfinite(value):
        raise models.broken(model, f"the perplexity on {dataset} is {value}")
    count, by_document = _documents(rows, join, spans, pieces, scored)
    result: Record = {"value": value, "nll_per_token": total / tokens, "tokens": tokens}
    result |= {"windows": len(pieces), "documents": count}
    result |= _normalised(total, text, spans, pieces) | {"protocol": facts}
    each = zip(losses, pieces, strict=True)
    by_window = [{"nll_per_token": loss, "tokens": piece.scored} for loss, piece in each]
    return result, {"window_losses": by_window, "document_losses": by_document}


def _documents(
    rows: Sequence[str],
    join: str,
    spans: list[Span] | None,
    pieces: Sequence[Window],
    scored: Sequence[numpy.ndarray],
) -> tuple[int | None, list[Record] | None]:
    """Return the number of documents with scored tokens, and the losses by document if there are several."""
    import numpy

    from . import documents

    if spans is None:
        return None, None
    starts = documents.starts(rows, join)
    if len(starts) == 1:
        return 1, None
    lasts = numpy.maximum.accumulate([end for _, end in spans]) - 1  # a token belongs to where its last character is
    owner = numpy.searchsorted(starts, numpy.maximum(lasts, 0), side="right") - 1
    places = [owner[piece.end - piece.scored : piece.end] for piece in pieces]
    found = documents.losses(scored, places, len(starts))
    return sum(one["tokens"] > 0 for one in found), found


def _with_bos(bos: int, ids: torch.Tensor, spans: list[Span] | None) -> tuple[torch.Tensor, list[Span] | None]:
    """Return ids and spans of a text that begins with BOS, which covers no character."""
    import torch

    return torch.cat([torch.tensor([bos]), ids]), None if spans is None else [(0, 0), *spans]


def _geometry(protocol: Protocol, context: int, dataset: str) -> Record:
    """Return {seq_len, stride, bos, bos_counts, version} as used.

    If the model's context is shorter, `requested_seq_len` is the protocol's length.
    The stride shrinks in proportion to the length, so that windows overlap by the same share.
    """
    seq_len = min(protocol.seq_len, context - protocol.added)
    text = seq_len + protocol.added - (protocol.bos == "every-window")
    stride = max(1, min(protocol.stride * seq_len // protocol.seq_len, text))
    used = {"seq_len": seq_len, "stride": stride, "bos": protocol.bos, "bos_counts": protocol.bos_counts}
    used |= {"version": protocol.version}
    if seq_len == protocol.seq_len:
        return used
    logger.info(
        "%s: using windows of %d tokens instead of %d, because the model's context is no longer",
        dataset,
        seq_len,
        protocol.seq_len,
    )
    return used | {"requested_seq_len": protocol.seq_len}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[torch.Tensor, list[Span] | None]:
    """Return the token ids [T] of a text and the (begin, end) characters of each token, or None for the latter."""
    import torch

    has_offsets = bool(getattr(tokenizer, "is_fast", False))  # only fast tokenizers return character positions
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=has_offsets)
    return torch.tensor(found["input_ids"], dtype=torch.long), found["offset_mapping"] if has_offsets else None


def _normalised(total: float, text: str, spans: list[Span] | None, pieces: Sequence[Window]) -> Record:
    """Return the summed loss `total` (nats) per word and per byte of the scored text (see the module docstring)."""
    keys = ("words", "bytes", "word_perplexity", "byte_perplexity", "bits_per_byte")
    if spans is None:
        return dict.fromkeys(keys)
    words, size = scored_text(text, spans, pieces)
    return {
        "words": words,
        "bytes": size,
        "word_perplexity": _exp(total / words) if words else None,
        "byte_perplexity": _exp(total / size) if size else None,
        "bits_per_byte": total / size / math.log(2) if size else None,
    }


def scored_text(text: str, spans: Sequence[Span], pieces: Sequence[Window]) -> tuple[int, int]:
    """Return the numbers of (words, UTF-8 bytes) in the scored part of `text`.

    Args:
        text: the whole text.
        spans: (begin, end) characters of each token.
        pieces: its windows.
    """
    import numpy

    # A token owns the characters from the previous token's end to its own end, so that spaces which a tokenizer leaves
    # out of the spans belong to the token after them. The running maximum keeps the ends from decreasing.
    ends = numpy.maximum.accumulate([end for _, end in spans])
    scored = numpy.zeros(len(text), dtype=bool)
    for piece in pieces:
        first = piece.end - piece.scored
        scored[ends[first - 1] if first else 0 : ends[piece.end - 1]] = True
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)  # UTF-8 bytes of each character
    lasts = numpy.fromiter((word.end() - 1 for word in re.finditer(r"\S+", text)), dtype=numpy.int64)
    return int(scored[lasts].sum()), int(sizes[scored].sum())


def _exp(value: float) -> float | None:
    """Return exp of `value`, or None if it overflows."""
    return None if value >= LARGEST_EXPONENT else math.exp(value)


def _token_losses(model: LoadedModel, pieces: Sequence[Window], label: str) -> list[numpy.ndarray]:
    """Return the negative log-likelihoods, in nats, of the scored tokens of each window, as float64."""
    import torch

    losses_of = kinds.of(model.config).token_losses(model)
    device = model.get_input_embeddings().weight.device
    batch = max(1, 2048 // len(pieces[0].ids))
    batches = [pieces[i : i + batch] for i in range(0, len(pieces), batch)]
    losses = []
    with torch.inference_mode():
        for group in logs.progress(batches, label, unit="batch"):
            for rows in _by_length(group):
                ids = torch.stack([piece.ids for piece in rows]).to(device)
                losses.extend(
                    row[len(row) - piece.scored :].double().cpu().numpy()
                    for row, piece in zip(losses_of(ids), rows, strict=True)
                )
    return losses


def _by_length(group: Iterable[Window]) -> list[list[Window]]:
    """Split consecutive windows into runs of equal length, which can be stacked; only the last can be shorter."""
    runs = []
    for piece in group:
        if not runs or len(runs[-1][0].ids) != len(piece.ids):
            runs.append([])
        runs[-1].append(piece)
    return runs
