"""Shard the frozen weights of a model over the processes of a training, if a single GPU cannot hold them.

torch's `fully_shard` (FSDP) splits the decoder layers: each process keeps its part and gathers a whole layer only while
it computes with it. The adapter, the embeddings and the output layer stay whole in every process, so gradients are
summed and checkpoints are written as in any training with several processes. Gathering is a collective operation, so
every process must run the same number of micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from coppice import models
from coppice.core import fingerprints
from coppice.core.errors import CoppiceError, SettingsError, TransientError
from coppice.models import estimates, library_compat
from coppice.models.kinds import MicroBatch

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger("coppice.finetuning")

# The last process waits while all others load the model, one after another: longer than torch's default timeout.
PATIENCE = timedelta(hours=6)


class OutOfMemory(TransientError):
    """A process that shares a model's weights ran out of memory; the others cannot continue without it."""


def wanted(setting: bool | None, source: models.Source, world: int) -> bool:
    """Return whether to shard the checkpoint `source`.

    `setting` (finetune.sharding) decides; if it is null, weights are sharded if they do not fit into one GPU.
    """
    if world <= 1 or setting is False:
        return False
    if setting is None and (source.quantize or not _too_large(source)):
        return False
    if source.quantize:
        raise SettingsError(
            f"finetune.sharding: a {source.quantize} base cannot be sharded over processes. Set models.X.device_map: "
            "auto (one process on several GPUs), or leave out models.X.quantize or finetune.sharding."
        )
    return True


def _too_large(source: models.Source) -> bool:
    if not torch.cuda.is_available():
        return False
    size = sum(file.stat().st_size for file in fingerprints.weights_files(source.path))
    # the smallest GPU decides, so that every process comes to the same answer
    room = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return size > estimates.ROOM_FOR_WEIGHTS * room


@contextmanager
def one_after_another() -> Iterator[None]:
    """Run the body of the `with` statement in one process at a time.

    Each process holds the whole model in the machine's memory while it loads it, and there may be room for one only.
    """
    if not distributed.is_initialized():
        distributed.init_process_group("gloo" if models.device().type == "cpu" else "nccl", timeout=PATIENCE)
    # Every process passes `world` barriers in all, and process r runs the body between its r-th and the next one.
    for _ in range(distributed.get_rank()):
        distributed.barrier()
    yield
    for _ in range(distributed.get_rank(), distributed.get_world_size()):
        distributed.barrier()


def shard(model: PeftModel) -> None:
    """Shard the frozen weights of `model` (a peft model on the CPU), and move it to this process's GPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = models.device()
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    plain = model.get_base_model()
    # Only frozen weights are sharded. The adapter stays whole, so that gradients are summed and checkpoints written as
    # without sharding.
    whole = {p for p in model.parameters() if p.requires_grad}
    whole |= {*plain.get_input_embeddings().parameters(), *plain.get_output_embeddings().parameters()}
    layers = [module for module in plain.modules() if type(module).__name__ in library_compat.whole_modules(plain)]
    if not layers:
        raise CoppiceError(
            f"finetune.sharding: {type(plain).__name__} does not list its decoder layers, so it cannot be sharded. "
            "Set finetune.sharding to false."
        )
    # FSDP wants children before their parent; wrapping the body too lets it gather the next layer early.
    for module in (*layers, plain.base_model):
        # By default FSDP keeps the outermost module gathered after its forward pass. A process with fewer targets could
        # then gather less often than the others, which would wait for it.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)
    size = sum(_local_bytes(p) for p in model.parameters())
    logger.info("sharded: each of %d processes holds %.2f GB of weights", mesh.size(), size / 1e9)


def _local_bytes(parameter: torch.Tensor) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()


def level(micro_batches: Sequence[MicroBatch], spare: MicroBatch) -> list[MicroBatch]:
    """Return `micro_batches`, filled up with empty ones to the largest number that any process has.

    spare: a micro-batch of any example, which is run without targets to take part in gathering the weights.
    """
    device = models.device()
    most = torch.tensor(len(micro_batches), device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return [*micro_batches, *[spare.without_targets()] * (int(most) - len(micro_batches))]
