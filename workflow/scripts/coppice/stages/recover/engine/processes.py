"""Run one function in several processes that train together, with torch's launcher, and pass their errors back.

The processes sum their gradients here, too.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import distributed, nn

from coppice.core import logs
from coppice.core.errors import CoppiceError, Stopped, TransientError, is_final
from coppice.core.records import atomic

from .sharding import OutOfMemory

logger = logging.getLogger("coppice.finetuning")

RANK, WORLD = "RANK", "WORLD_SIZE"
# The errors that a process can pass to the launching one, which turns the name back into the class.
KINDS = {kind.__name__: kind for kind in (OutOfMemory, Stopped, TransientError, CoppiceError)}


def is_first() -> bool:
    """Return whether this process writes the results: it is the only one, or the first of several."""
    return int(os.environ.get(RANK, 0)) == 0


def count() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get(WORLD, 1))


def sum_gradients(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Sum gradients and loss over all processes, and return that loss; a process without examples adds zeros."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    # one all_reduce for everything, in float32 whatever the dtype of the parameters
    flat = torch.cat([loss.float().reshape(1), *(part.float().reshape(-1) for part in parts)])
    distributed.all_reduce(flat)
    for p, part in zip(trained, flat[1:].split([p.numel() for p in trained]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)
    return flat[0].clone()  # a view would keep all of `flat` in memory


def run(function: Callable[..., None], arguments: Mapping[str, object], world: int) -> None:
    """Call `function(**arguments)` in this process, or in `world` new ones that form a torch process group.

    If a process fails with a CoppiceError, that error is raised here, as one of `KINDS`.
    """
    if world <= 1:
        function(**arguments)
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port: several trainings may run on one machine
        run_id="finetune",
        max_restarts=0,
        start_method="spawn",  # CUDA cannot be used in a process that was forked
    )
    logger.info("training in %d processes", world)
    with tempfile.TemporaryDirectory() as scratch:
        reason = Path(scratch) / "reason"  # the launcher reports exit codes only; the error itself goes through a file
        try:
            elastic_launch(config, _worker)(function, arguments, _log_file(), reason)
        except SignalException as error:
            raise Stopped(
                "finetune: stopped by a signal. Run the same command again to continue from the newest checkpoint."
            ) from error
        except ChildFailedError as error:
            if reason.is_file():
                kind, text = json.loads(reason.read_text(encoding="utf-8"))
                raise KINDS[kind](text) from None
            # no reason: the process was killed, or it failed with an unforeseen error, which it has logged
            rank, failure = error.get_first_failure()
            raise TransientError(
                f"finetune: process {rank} of {world} ended with exit code {failure.exitcode}. See the log for why."
            ) from error


def _log_file() -> str | None:
    files = [handler.baseFilename for handler in logging.getLogger().handlers if hasattr(handler, "baseFilename")]
    return files[0] if files else None


def _worker(function: Callable[..., None], arguments: Mapping[str, object], log: str | None, reason: Path) -> None:
    """Run one of the processes, with the job's log file.

    A process that fails must exit: the launcher then ends the others, which would wait for its gradients forever.
    """
    # without this, all processes would use the first GPU
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    logs.start_logging(log, append=True)
    if not is_first():  # all processes log the same lines
        logging.getLogger().setLevel(logging.WARNING)
    try:
        function(**arguments)
    except CoppiceError as error:
        with atomic(reason) as file:
            json.dump([_kind(error), str(error)], file)
        raise SystemExit(1) from None
    except Exception:
        logger.exception("process %s failed", os.environ.get(RANK))
        raise


def _kind(error: CoppiceError) -> str:
    """Return the name in `KINDS` under which an error is passed to the launching process."""
    # The class decides what happens next: after OutOfMemory the processes start again, after Stopped or TransientError
    # the job may be retried, and a plain CoppiceError is for the user to fix.
    for kind in (OutOfMemory, Stopped):
        if isinstance(error, kind):
            return kind.__name__
    return CoppiceError.__name__ if is_final(error) else TransientError.__name__
