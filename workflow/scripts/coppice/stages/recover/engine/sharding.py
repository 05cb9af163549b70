"""The frozen weights of a model spread over the processes of a training, where a single GPU cannot hold them.

torch's `fully_shard` (FSDP) takes the decoder layers apart: each process keeps its share and gathers a layer for as
long as it computes with it. The adapter, the embeddings and the output layer stay whole in every process, so gradients
are summed, checkpoints written and adapters saved as in any training of several processes. What processes gather they
gather together: each has to run as many micro-batches as the others.
"""

import logging
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from coppice import models
from coppice.core import fingerprints
from coppice.core.errors import CoppiceError, SettingsError, TransientError
from coppice.models import estimates

logger = logging.getLogger("coppice.finetuning")

PATIENCE = timedelta(hours=6)  # the last process waits for all others to load the model


class OutOfMemory(TransientError):
    """A process that shares a model's weights ran out of memory: the others cannot go on without it."""


def wanted(setting, source, world):
    """Whether to shard the checkpoint `source`: as set, else where its weights do not fit the memory of one GPU."""
    if world <= 1 or setting is False:
        return False
    if setting is None and (source.quantize or not _too_large(source)):
        return False
    if source.quantize:
        raise SettingsError(
            f"finetune.sharding: a {source.quantize} base cannot be spread over processes; set models.X.device_map: "
            "auto (one process, several GPUs), or leave out models.X.quantize or finetune.sharding"
        )
    return True


def _too_large(source):
    if not torch.cuda.is_available():
        return False
    size = sum(file.stat().st_size for file in fingerprints.weights_files(source.path))
    # of the smallest: every process has to come to the same answer
    room = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return size > estimates.ROOM_FOR_WEIGHTS * room


@contextmanager
def one_after_another():
    """Let processes do what follows in turns: each holds the whole model in the machine's memory while it loads it."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo" if models.device().type == "cpu" else "nccl", timeout=PATIENCE)
    for _ in range(distributed.get_rank()):
        distributed.barrier()
    yield
    for _ in range(distributed.get_rank(), distributed.get_world_size()):
        distributed.barrier()


def shard(model):
    """Take apart the frozen weights of `model` (with its adapter, on the CPU); the rest goes to this process's GPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = models.device()
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    causal = model.get_base_model()
    whole = {p for p in model.parameters() if p.requires_grad}
    whole |= {*causal.get_input_embeddings().parameters(), *causal.get_output_embeddings().parameters()}
    layers = [module for module in causal.modules() if type(module).__name__ in (causal._no_split_modules or ())]
    if not layers:
        raise CoppiceError(f"finetune.sharding: {type(causal).__name__} does not say what its decoder layers are")
    for module in (*layers, causal.base_model):  # the body last: it sees to it that the next layer is gathered early
        # the body too goes back to its shares: else a process that had fewer targets may gather less than the others
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)
    held = sum(_held(p) for p in model.parameters())
    logger.info("sharded: each of %d processes holds %.2f GB of weights", mesh.size(), held / 1e9)


def _held(parameter):
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()


def level(micro_batches, spare):
    """`micro_batches`, and empty ones up to the number that the process with the most of them has.

    spare: a micro-batch of any example, which is run for no target at all.
    """
    device = models.device()
    most = torch.tensor(len(micro_batches), device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return [*micro_batches, *[spare.without_targets()] * (int(most) - len(micro_batches))]
