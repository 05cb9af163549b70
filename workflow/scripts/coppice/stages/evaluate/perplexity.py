"""Perplexity by named protocols: exp of the mean negative log-likelihood a token, over windows of a joined text.

Numbers under different protocols cannot be compared, so each result names its own: which rows, how they were joined,
window length, stride, and whether each window begins with BOS. A window's first token has no context and is not scored.

`gptq-2048` is what GPTQ (Frantar et al. 2022, arXiv:2210.17323) and most pruning papers since report: WikiText2 test
joined by blank lines, PTB test joined by spaces, non-overlapping windows of 2048 tokens, the incomplete last one left
out. `llmpruner-128` is LLM-Pruner's (Ma et al. 2023, arXiv:2305.11627): WikiText2 test and PTB *validation*, blank
lines, windows of 128. Others come from the configuration.

A value a token depends on the tokenizer; those a word and a byte compare models of different vocabularies. They divide
the same summed loss by the words (runs of non-space, Python's `str.split`) and the UTF-8 bytes of the *scored* text: a
character belongs to the token that covers it (a space between two tokens to the later one), a word to the token that
covers its last character, so what the unscored first tokens of windows hold is counted neither above nor below.
"""

import logging
import math
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from coppice import models
from coppice.core import logs
from coppice.core.errors import DataError

logger = logging.getLogger("coppice.perplexity")

# What stands in for a protocol's rows when candidates are scored: never the rows that the reports use.
OTHER_ROLE = {"report": "selection", "selection": "train", "train": "selection"}
LARGEST_EXPONENT = 700  # exp of more overflows


@dataclass(frozen=True)
class Protocol:
    """How a text becomes scored windows. `join` and `role` are by dataset, with '' for all the others."""

    name: str
    seq_len: int
    stride: int
    join: dict = field(default_factory=lambda: {"": "\n\n"})
    role: dict = field(default_factory=lambda: {"": "report"})
    bos: bool = False

    def join_of(self, dataset):
        """The string between two rows of `dataset`."""
        return self.join.get(dataset, self.join[""])

    def role_of(self, dataset, purpose):
        """The role of `dataset` to score: for the report what the protocol says, for selection never that one."""
        report = self.role.get(dataset, self.role[""])
        return report if purpose == "report" else OTHER_ROLE[report]

    def facts(self, dataset, purpose="report"):
        """All that decides what is scored of `dataset`, for a key."""
        return {
            "protocol": self.name,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "join": self.join_of(dataset),
            "role": self.role_of(dataset, purpose),
            "bos": self.bos,
        }


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("gptq-2048", 2048, 2048, join={"": "\n\n", "ptb": " "}),
        Protocol("llmpruner-128", 128, 128, role={"": "report", "ptb": "selection"}),
    )
}


def protocols(settings):
    """The protocols to measure under, the first of which stands for the model: a list of `Protocol`.

    settings: {protocol: a name or a list of names, bos, protocols: name -> {seq_len, stride, join, role, bos}}.
    """
    names = settings["protocol"]
    own, bos = settings.get("protocols") or {}, bool(settings.get("bos"))
    return [_protocol(name, own.get(name), bos) for name in ([names] if isinstance(names, str) else names)]


def _protocol(name, own, bos):
    if own is None:
        return replace(PROTOCOLS[name], bos=bos)
    begins = bos if own.get("bos") is None else own["bos"]
    stride = own.get("stride") or own["seq_len"]
    return Protocol(name, own["seq_len"], stride, {"": own["join"]}, {"": own["role"]}, begins)


def encode(tokenizer, rows, join):
    """Token ids [T] of `rows` joined by `join`; no special tokens, which the windows add where the protocol asks."""
    import torch

    ids = tokenizer(join.join(rows), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


class Window(NamedTuple):
    """Input ids [L], how many of the last targets are scored, and where in the text's tokens the window ends."""

    ids: object
    scored: int
    end: int


def windows(ids, seq_len, stride, bos=None):
    """Cut token ids [T] into windows (`Window`).

    Each scores the targets that no window before it scored. A text shorter than one window is one window by itself.
    With `bos`, each window begins with that id, at the cost of one token of text.
    """
    import torch

    length = seq_len - (bos is not None)
    starts = range(0, max(len(ids) - length, 0) + 1, stride) if len(ids) >= length else [0]
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    reached = 0
    for start in starts:
        piece = torch.cat([prefix, ids[start : start + length]])
        end = start + len(piece) - len(prefix)
        first = start + 1 if bos is None else start
        scored = end - max(first, reached)
        reached = end
        yield Window(piece, scored, end)


def measure(model, tokenizer, rows, dataset, protocol, bos=None, split=None):
    """Perplexity of `rows` (strings) under `protocol`; returns the result and its per-window losses.

    The result: {value, nll_per_token (nats), tokens (scored), windows, words, bytes (of the scored text),
    word_perplexity, byte_perplexity, bits_per_byte, protocol}; those a word and a byte are None for a tokenizer that
    does not tell where its tokens lie. bos overrides the protocol's. Raises DataError where the text has too few tokens
    to score one, CheckpointError where the perplexity is no finite number.
    """
    bos = protocol.bos if bos is None else bos
    if bos and tokenizer.bos_token_id is None:
        raise DataError("evaluate.perplexity.bos: the model's tokenizer has no BOS token")
    join = protocol.join_of(dataset)
    facts = {"name": protocol.name, "split": split, "join": join}
    facts |= _geometry(protocol, models.context_length(model), bos, dataset)
    text = join.join(rows)
    ids, spans = _encode(tokenizer, text)
    if len(ids) < 2:
        raise DataError(f"dataset {dataset}: its text has {len(ids)} tokens, too few for a perplexity")
    first = tokenizer.bos_token_id if bos else None
    pieces = list(windows(ids, facts["seq_len"], facts["stride"], first))
    losses = _window_losses(model, pieces, f"perplexity {dataset}")
    tokens = sum(piece.scored for piece in pieces)
    total = math.fsum(loss * piece.scored for loss, piece in zip(losses, pieces, strict=True))
    value = _exp(total / tokens) or math.inf
    if not math.isfinite(value):
        raise models.broken(model, f"the perplexity on {dataset} is {value}")
    result = {"value": value, "nll_per_token": total / tokens, "tokens": tokens}
    result |= {"windows": len(pieces)} | _normalised(total, text, spans, pieces) | {"protocol": facts}
    each = zip(losses, pieces, strict=True)
    return result, [{"nll_per_token": loss, "tokens": piece.scored} for loss, piece in each]


def _geometry(protocol, context, bos, dataset):
    """{seq_len, stride, bos} as used, with `requested_seq_len` where the model's context is shorter.

    The stride shrinks with the length, so that the overlap stays the same share of a window.
    """
    seq_len = min(protocol.seq_len, context)
    stride = max(1, min(protocol.stride * seq_len // protocol.seq_len, seq_len - bool(bos)))
    used = {"seq_len": seq_len, "stride": stride, "bos": bool(bos)}
    if seq_len == protocol.seq_len:
        return used
    logger.info("%s: windows of %d, the model's context, instead of %d", dataset, seq_len, protocol.seq_len)
    return used | {"requested_seq_len": protocol.seq_len}


def _encode(tokenizer, text):
    """Token ids [T] of a text and the (begin, end) characters of each; None for the latter where unknown."""
    import torch

    known = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=known)
    return torch.tensor(found["input_ids"], dtype=torch.long), found["offset_mapping"] if known else None


def _normalised(total, text, spans, pieces):
    """What the summed loss `total` (nats) is a word and a byte of the scored text; see the module's head."""
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


def scored_text(text, spans, pieces):
    """(words, UTF-8 bytes) of what the windows score of `text`; spans: (begin, end) characters of each token."""
    import numpy

    ends = numpy.maximum.accumulate([end for _, end in spans])  # the characters up to a token's end are its own
    scored = numpy.zeros(len(text), dtype=bool)
    for piece in pieces:
        first = piece.end - piece.scored
        scored[ends[first - 1] if first else 0 : ends[piece.end - 1]] = True
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    lasts = numpy.fromiter((word.end() - 1 for word in re.finditer(r"\S+", text)), dtype=numpy.int64)
    return int(scored[lasts].sum()), int(sizes[scored].sum())


def _exp(value):
    """exp of `value`, or None where it overflows."""
    return None if value >= LARGEST_EXPONENT else math.exp(value)


def _window_losses(model, pieces, label):
    """Mean negative log-likelihood of the scored tokens of each window, in nats, windows of one length batched."""
    import torch

    from coppice.models import output_head

    body, head = output_head.parts(model)
    device = model.get_input_embeddings().weight.device
    batch = max(1, 2048 // len(pieces[0].ids))
    batches = [pieces[i : i + batch] for i in range(0, len(pieces), batch)]
    losses = []
    with torch.inference_mode():
        for group in logs.progress(batches, label, unit="batch"):
            for rows in _by_length(group):
                ids = torch.stack([piece.ids for piece in rows]).to(device)
                losses.extend(_losses(model, body, head, ids, [piece.scored for piece in rows]))
    return losses


def _by_length(group):
    """Split consecutive windows into runs of equal length (only the last window can be shorter)."""
    runs = []
    for piece in group:
        if not runs or len(runs[-1][0].ids) != len(piece.ids):
            runs.append([])
        runs[-1].append(piece)
    return runs


def _losses(model, body, head, ids, scored):
    """Mean loss of the last `scored[i]` targets of each row of ids [B, L]."""
    import torch

    from coppice.models import output_head

    if body is None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    else:
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        each = output_head.token_losses(head, hidden.flatten(0, 1), ids[:, 1:].flatten()).view(hidden.shape[:2])
    return [row[len(row) - count :].double().mean().item() for row, count in zip(each, scored, strict=True)]
