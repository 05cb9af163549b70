"""Running one function in several processes that train together, by torch's own launcher; errors come back in words."""

import json
import logging
import os
import tempfile
from pathlib import Path

from coppice.core import logs
from coppice.core.errors import CoppiceError, Stopped, TransientError, is_final
from coppice.core.records import atomic

from .sharding import OutOfMemory

logger = logging.getLogger("coppice.finetuning")

RANK, WORLD = "RANK", "WORLD_SIZE"
KINDS = {kind.__name__: kind for kind in (OutOfMemory, Stopped, TransientError, CoppiceError)}  # what a process may say


def is_first():
    """Whether this process writes what comes of the training: the only one, or the first of several."""
    return int(os.environ.get(RANK, 0)) == 0


def count():
    """The number of processes that train together."""
    return int(os.environ.get(WORLD, 1))


def run(function, arguments, world):
    """Call `function(**arguments)` here, or in `world` processes on this machine that know of each other.

    Raises the error of the first process that failed for a reason that it could say, as one of `KINDS`.
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
        rdzv_endpoint="localhost:0",
        run_id="finetune",
        max_restarts=0,
        start_method="spawn",
    )
    logger.info("training in %d processes", world)
    with tempfile.TemporaryDirectory() as scratch:
        reason = Path(scratch) / "reason"
        try:
            elastic_launch(config, _worker)(function, arguments, _log_file(), reason)
        except SignalException as error:
            raise Stopped("finetune: told to stop; a rerun goes on from the newest checkpoint") from error
        except ChildFailedError as error:
            if reason.is_file():
                kind, text = json.loads(reason.read_text(encoding="utf-8"))
                raise KINDS[kind](text) from None
            rank, failure = error.get_first_failure()
            raise TransientError(
                f"finetune: process {rank} of {world} ended with exit code {failure.exitcode}; the log says more"
            ) from error


def _log_file():
    files = [handler.baseFilename for handler in logging.getLogger().handlers if hasattr(handler, "baseFilename")]
    return files[0] if files else None


def _worker(function, arguments, log, reason):
    """One process: its log lines go where the job's go, those of all but the first only from warnings on.

    A failure ends it, upon which the launcher ends the others: they would wait for its gradients for ever.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    logs.start_logging(log, append=True)
    if not is_first():
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


def _kind(error):
    """The name of what an error is to the launching process: one of `KINDS`."""
    for kind in (OutOfMemory, Stopped):
        if isinstance(error, kind):
            return kind.__name__
    return CoppiceError.__name__ if is_final(error) else TransientError.__name__
