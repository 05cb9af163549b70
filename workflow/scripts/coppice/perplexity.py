"""Perplexity by named protocols: exp of the mean negative log-likelihood a token, over windows of a joined text.

Numbers under different protocols cannot be compared, so each result names its own: which rows, how they were joined,
window length, stride, and whether each window begins with BOS. A window's first token has no context and is not scored.

`gptq-2048` is what GPTQ (Frantar et al. 2022, arXiv:2210.17323) and most pruning papers since report: WikiText2 test
joined by blank lines, PTB test joined by spaces, non-overlapping windows of 2048 tokens, the incomplete last one left
out. `llmpruner-128` is LLM-Pruner's (Ma et al. 2023, arXiv:2305.11627): WikiText2 test and PTB *validation*, blank
lines, windows of 128.
"""

import logging
import math
from dataclasses import dataclass, field

from . import logs, models
from .errors import DataError

logger = logging.getLogger("coppice.perplexity")


@dataclass(frozen=True)
class Protocol:
    """How a text becomes scored windows. `join` and `role` are by dataset, with '' for all the others."""

    name: str
    seq_len: int
    stride: int
    join: dict = field(default_factory=lambda: {"": "\n\n"})
    role: dict = field(default_factory=lambda: {"": "report"})

    def join_of(self, dataset):
        """The string between two rows of `dataset`."""
        return self.join.get(dataset, self.join[""])

    def role_of(self, dataset, purpose):
        """The role of `dataset` to score: for the report what the protocol says, for selection never that one."""
        report = self.role.get(dataset, self.role[""])
        if purpose == "report":
            return report
        return "selection" if report == "report" else "train"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("gptq-2048", 2048, 2048, join={"": "\n\n", "ptb": " "}),
        Protocol("llmpruner-128", 128, 128, role={"": "report", "ptb": "selection"}),
    )
}


def encode(tokenizer, rows, join):
    """Token ids [T] of `rows` joined by `join`; no special tokens, which the windows add where the protocol asks."""
    import torch

    ids = tokenizer(join.join(rows), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def windows(ids, seq_len, stride, bos=None):
    """Cut token ids [T] into (input ids [L], number of scored targets) windows.

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
        yield piece, scored


def measure(model, tokenizer, rows, dataset, protocol, bos=False, split=None):
    """Perplexity of `rows` (strings) under `protocol`; returns the result and its per-window losses.

    The result: {value, nll_per_token (nats), tokens (scored), windows, protocol}. Raises DataError where the text has
    too few tokens to score one.
    """
    limit = models.context_length(model)
    seq_len = min(protocol.seq_len, limit)
    if seq_len < protocol.seq_len:
        logger.info("%s: windows of %d, the model's context, instead of %d", dataset, seq_len, protocol.seq_len)
    stride = min(protocol.stride, seq_len) - bool(bos)
    join = protocol.join_of(dataset)
    ids = encode(tokenizer, rows, join)
    if len(ids) < 2:
        raise DataError(f"dataset {dataset}: its text has {len(ids)} tokens, too few for a perplexity")
    if bos and tokenizer.bos_token_id is None:
        raise DataError("evaluate.perplexity.bos: the model's tokenizer has no BOS token")
    pieces = list(windows(ids, seq_len, stride, tokenizer.bos_token_id if bos else None))
    losses = _window_losses(model, pieces, f"perplexity {dataset}")
    tokens = sum(scored for _, scored in pieces)
    nll = math.fsum(loss * scored for loss, (_, scored) in zip(losses, pieces, strict=True)) / tokens
    facts = {
        "name": protocol.name,
        "split": split,
        "join": join,
        "seq_len": seq_len,
        "stride": stride,
        "bos": bool(bos),
    }
    if seq_len < protocol.seq_len:
        facts["requested_seq_len"] = protocol.seq_len
    value = math.exp(nll) if not nll >= 700 else math.inf  # NaN stays NaN
    result = {"value": value, "nll_per_token": nll, "tokens": tokens, "windows": len(pieces), "protocol": facts}
    return result, [{"nll_per_token": loss, "tokens": scored} for loss, (_, scored) in zip(losses, pieces, strict=True)]


def _window_losses(model, pieces, label):
    """Mean negative log-likelihood of the scored tokens of each window, in nats, windows of one length batched."""
    import torch

    from . import output_layer

    body, head = output_layer.parts(model)
    device = model.get_input_embeddings().weight.device
    batch = max(1, 2048 // len(pieces[0][0]))
    batches = [pieces[i : i + batch] for i in range(0, len(pieces), batch)]
    losses = []
    with torch.inference_mode():
        for group in logs.progress(batches, label, unit="batch"):
            for rows in _by_length(group):
                ids = torch.stack([piece for piece, _ in rows]).to(device)
                losses.extend(_losses(model, body, head, ids, [scored for _, scored in rows]))
    return losses


def _by_length(group):
    """Split consecutive windows into runs of equal length (only the last window can be shorter)."""
    runs = []
    for piece in group:
        if not runs or len(runs[-1][0][0]) != len(piece[0]):
            runs.append([])
        runs[-1].append(piece)
    return runs


def _losses(model, body, head, ids, scored):
    """Mean loss of the last `scored[i]` targets of each row of ids [B, L]."""
    import torch

    from . import output_layer

    if body is None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    else:
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        each = output_layer.token_losses(head, hidden.flatten(0, 1), ids[:, 1:].flatten()).view(hidden.shape[:2])
    return [row[len(row) - count :].double().mean().item() for row, count in zip(each, scored, strict=True)]
