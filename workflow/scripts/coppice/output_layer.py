"""The output layer of a causal language model, applied only where a token is predicted, and in chunks.

The full `[batch, length, vocabulary]` logits of a 128k-vocabulary model are the largest tensor of an evaluation by far,
and most of it is never looked at. Here the body gives hidden states, and the head is applied to the rows asked for.
"""

import logging

import torch

logger = logging.getLogger("coppice.output_layer")

CHUNK_BYTES = 64 * 2**20  # float32 logits held at a time


def causal_lm(model):
    """The causal LM itself, without the adapter's wrapper (whose LoRA layers stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts(model):
    """(body, head) of `model`, where head(body(ids)) gives its logits; (None, None) where it does more than that.

    Some architectures scale or cap their logits after the head: a probe of a few tokens finds out.
    """
    causal = causal_lm(model)
    body, head = causal.base_model, causal.get_output_embeddings()
    if head is None or body is causal:
        return None, None
    training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = head(body(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(training)
    if not torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3):
        logger.warning("%s changes its logits after the output layer: full logits are computed", type(causal).__name__)
        return None, None
    return body, head


def token_losses(head, hidden, targets):
    """Negative log-likelihood of `targets` [N] under `head` at the rows of `hidden` [N, width]: float32 [N].

    Computed in chunks of rows, so that memory does not grow with the vocabulary times N.
    """
    rows = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
    losses = []
    for start in range(0, hidden.shape[0], rows):
        logits = head(hidden[start : start + rows]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets[start : start + rows], reduction="none"))
    return torch.cat(losses)
