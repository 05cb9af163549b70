"""Find the zeros that pruning left in single weights, count them, and keep them when an adapter is merged.

Only matrices count, those of linear layers and experts: unstructured pruning and patterns such as 2:4 set their weights
to zero. Embeddings, norms and quantized weights, whose zeros are codes, do not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger("coppice.models")

SPARSE = 0.01  # share of zeros above which a layer was pruned: rounding alone leaves dense models with far fewer
PATTERNS = ((2, 4), (4, 8))  # (nonzero weights, of how many in a row): what GPUs or kernels can exploit
DENSE = "dense"  # in the name of a folder that may take the dense weights of a sparse model


def measure(model: nn.Module) -> dict[str, Any] | None:
    """Count the zeros in the matrices of a model, with an adapter or without; the adapter does not count.

    Returns:
        {weights, zeros, share (0 to 1), pattern ("2:4" if every pruned layer has it, else None)}; None if the model is
        quantized.
    """
    weights = list(_weights(model))
    if getattr(model, "is_quantized", False) or not weights:
        return None
    counts = [(weight.numel(), int((weight == 0).sum())) for _, weight in weights]
    total, zeros = (sum(numbers) for numbers in zip(*counts, strict=True))
    pruned = [weight for (_, weight), (size, zero) in zip(weights, counts, strict=True) if zero >= SPARSE * size]
    share = zeros / total
    found = (f"{kept}:{of}" for kept, of in PATTERNS if pruned and all(_has(weight, kept, of) for weight in pruned))
    return {"weights": total, "zeros": zeros, "share": share, "pattern": next(found, None)}


def is_sparse(found: dict[str, Any] | None) -> bool:
    """Return whether single weights were pruned. found: as from `measure`."""
    return bool(found) and found["share"] >= SPARSE


def described(found: dict[str, Any]) -> str:
    """Return "50.0 % zeros (2:4)". found: as from `measure`."""
    pattern = f" ({found['pattern']})" if found["pattern"] else ""
    return f"{100 * found['share']:.1f} % zeros{pattern}"


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameter name -> bool mask of the zeros, for each pruned matrix."""
    found = {name: weight == 0 for name, weight in _weights(model)}
    return {name: mask for name, mask in found.items() if int(mask.sum()) >= SPARSE * mask.numel()}


def merge(model: nn.Module, keep_zeros: bool) -> nn.Module:
    """Merge a model's LoRA adapter into its weights, and return the plain model.

    Args:
        model: a peft model. It cannot be used afterwards.
        keep_zeros: whether the zeros of pruned layers stay zero; what the adapter adds there is lost.
    """
    if keep_zeros:
        _merge_under_masks(model)
    return model.merge_and_unload()  # takes the layers off that are merged already, and merges the others


def _merge_under_masks(model: nn.Module) -> None:
    """Merge the adapted layers that were pruned, one by one, so that there is a mask of one layer at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in list(model.modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        if zeros := masks(base):
            module.merge()
            for name, mask in zeros.items():
                base.get_parameter(name).data.masked_fill_(mask, 0)
    # a module that was trained whole replaces its original
    parameters = dict(model.named_parameters())
    for name, mask in masks(model).items():
        trained = parameters.get(name.replace(".original_module.", ".modules_to_save.default."))
        if ".original_module." in name and trained is not None:
            trained.data.masked_fill_(mask, 0)


def check_name(folder: str | Path, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
    """Refuse to write a model that lost its zeros to a folder whose name does not say that it is dense.

    Args:
        folder: where the model is to be written.
        before: the zeros of the pruned model, as from `measure`.
        after: those of the model to write.

    Raises:
        CheckpointError: fewer weights are zero than before, and the folder's name does not contain "dense".
    """
    if not is_sparse(before) or after is None or after["zeros"] >= before["zeros"] or DENSE in Path(folder).name:
        return
    raise CheckpointError(
        f"{folder}: the model to be written has {described(after)}, but it was pruned to {described(before)}. Keep the "
        f"zeros (keep_sparsity: mask), or put '{DENSE}' in the folder's name."
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of each matrix but those of embeddings and adapters; experts are stacks of them."""
    from torch import nn

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # an output layer may be tied
    for name, parameter in model.named_parameters():
        own = ".lora_" not in name and ".modules_to_save." not in name and id(parameter) not in embeddings
        if own and parameter.dim() > 1 and parameter.is_floating_point():
            yield name, parameter.detach()


def _has(weight: torch.Tensor, kept: int, of: int) -> bool:
    """Return whether each `of` adjacent weights of a row hold at most `kept` that are not zero."""
    if weight.shape[-1] % of:
        return False
    return bool(((weight != 0).view(*weight.shape[:-1], -1, of).sum(-1) <= kept).all())
