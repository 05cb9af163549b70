"""Lease GPUs to jobs, because Snakemake counts devices but never says which one is free.

A lease is a file in a folder of the machine, locked by the process that computes. The kernel releases the lock when the
process ends, however it ends. A job gets all devices that it asked for at once, or none. Devices are identified by
UUID, so that runs which name them by number, by UUID or as MIG parts can share a machine. If a cluster's scheduler
started the job for its rule, it has already chosen the devices and nothing is leased; jobs of a group, which the
scheduler starts as one, lease from the devices that the group has.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TextIO, TypeVar

from filelock import FileLock

from .errors import CoppiceError

Answer = TypeVar("Answer")
NoteState = Callable[..., object]  # called as note_state(state, reason=...) with the state of a job

logger = logging.getLogger("coppice.gpus")

VISIBLE = "CUDA_VISIBLE_DEVICES"
GIVEN = "COPPICE_GPUS_GIVEN"  # the workflow sets it in jobs that a cluster's scheduler started
SHARE, SKIP_BUSY = "COPPICE_GPUS_SHARE", "COPPICE_GPUS_SKIP_BUSY"  # the workflow sets them from its configuration
FOLDER = "COPPICE_GPU_LEASES"  # folder of the leases; by default the machine's folder for temporary files
SHORTEST, LONGEST = 0.05, 1.0  # seconds between two searches for a free device
REMINDER = 60.0  # seconds between two log lines about waiting


@dataclass(frozen=True)
class Device:
    """A GPU or a MIG part: `name` as in `CUDA_VISIBLE_DEVICES`, its `uuid`, and its memory in MB (None: not known)."""

    name: str
    uuid: str
    memory: int | None = None

    def folder(self) -> Path:
        """Return the folder of this device's leases."""
        return _root() / self.uuid.replace("/", "_")


@contextlib.contextmanager
def lease(
    wanted: int, memory: int | None = None, note_state: NoteState = lambda *state, **facts: None
) -> Iterator[list[Device]]:
    """Hold `wanted` GPUs while the block runs, with `CUDA_VISIBLE_DEVICES` set to them; torch must not be loaded yet.

    Nothing is leased if `wanted` is 0, if there is no GPU, or if the scheduler gave the job exactly its devices. If it
    gave more, jobs of the same group share them. With `SKIP_BUSY`, devices on which other programs compute are left
    out.

    Args:
        wanted: number of devices.
        memory: MB of each device that the job will use. Without it, or without `SHARE` in the environment, the job
            takes whole devices.
        note_state: called as note_state(state, reason=...) when the job waits and when it runs.

    Yields:
        The leased devices; an empty list if nothing is leased.

    Raises:
        CoppiceError: if this machine can never provide `wanted` such devices.
    """
    devices = visible() if wanted else []
    if not devices or (os.environ.get(GIVEN) and len(devices) <= wanted):
        yield []
        return
    memory = memory if os.environ.get(SHARE) else None
    _check_possible(devices, wanted, memory)
    with contextlib.ExitStack() as held:
        taken = _wait(held, devices, wanted, memory, note_state)
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = ",".join(device.name for device in taken)
        logger.info("on %s", ", ".join(f"GPU {device.name}" for device in taken))
        try:
            yield taken
        finally:
            os.environ.pop(VISIBLE) if before is None else os.environ.__setitem__(VISIBLE, before)


def visible() -> list[Device]:
    """Return the devices that this process may use: those in `CUDA_VISIBLE_DEVICES`, or all if it is not set."""
    listed = _listed()
    wanted = os.environ.get(VISIBLE)
    if wanted is None:
        # by UUID: CUDA and NVML may number the devices of a machine differently
        return [Device(d.uuid, d.uuid, d.memory) for d in listed] or [
            Device(str(place), node) for place, node in enumerate(_nodes())
        ]
    names = []
    for name in (part.strip() for part in wanted.split(",")):
        if name in ("", "-1", "NoDevFiles"):
            break  # CUDA also hides everything after such an entry
        names.append(name)
    return [_device(name, listed) for name in names]


def largest() -> int | None:
    """Return the memory of the largest visible device in MB; None if no driver reports it."""
    return max((device.memory for device in visible() if device.memory), default=None)


def _device(name: str, listed: Iterable[Device]) -> Device:
    """Return the device that `name` means: a number, a UUID or its beginning, or a MIG part."""
    for device in listed:
        if name == device.name or name == device.uuid or (name.startswith("GPU-") and device.uuid.startswith(name)):
            return Device(name, device.uuid, device.memory)
    return Device(name, name)


def _listed() -> list[Device]:
    """Return the devices that NVIDIA's driver lists; [] if there is no driver or it does not answer."""
    return _ask_driver(
        lambda nvml, index, handle: Device(str(index), nvml.nvmlDeviceGetUUID(handle), _memory(nvml, handle))
    )


def _memory(nvml: ModuleType, handle: object) -> int | None:
    """Return a device's memory in MB; None for devices that share the memory of their machine."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20
    except nvml.NVMLError_NotSupported:
        return None


def _busy() -> set[str]:
    """Return the UUIDs of the devices on which any process computes."""
    found = _ask_driver(
        lambda nvml, index, handle: (
            nvml.nvmlDeviceGetUUID(handle) if nvml.nvmlDeviceGetComputeRunningProcesses(handle) else None
        )
    )
    return {uuid for uuid in found if uuid is not None}


def _ask_driver(question: Callable[[ModuleType, int, object], Answer]) -> list[Answer]:
    """Return question(NVML, index, handle) for each device of the machine; [] without a driver that answers.

    NVML numbers all devices, whatever `CUDA_VISIBLE_DEVICES` says, and does not initialize CUDA in this process.
    """
    try:
        import pynvml
    except ImportError:  # an environment without the package leases devices by their device files
        return []
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return [question(pynvml, index, handle) for index, handle in enumerate(handles)]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError_LibraryNotFound:
        return []
    except pynvml.NVMLError as error:
        logger.warning("NVIDIA's driver does not answer: %s", error)
        return []


def configure(share: bool, skip_busy: bool, given: bool) -> None:
    """Set, in the environment, how jobs share devices; `given`: a scheduler chose the devices for this very job."""
    for name, wanted in ((SHARE, share), (SKIP_BUSY, skip_busy), (GIVEN, given)):
        if wanted:
            os.environ[name] = "1"


def present() -> bool:
    """Return whether this machine has a GPU, without waking the driver."""
    return bool(shutil.which("nvidia-smi") or _nodes())


def _nodes() -> list[str]:
    """Return the device files in CUDA's order; in a container, their numbers are still those of the machine."""
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [f"nvidia{number}" for number in sorted(int(number) for number in numbers if number.isdigit())]


def count() -> int:
    """Return the number of GPUs that the driver shows to this process; 0 if there is no driver.

    Do not call this before a lease: the driver reads `CUDA_VISIBLE_DEVICES` once, at its first call.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(found)):
        return 0
    return found.value


def _check_possible(devices: Sequence[Device], wanted: int, memory: int | None) -> None:
    if wanted > len(devices):
        raise CoppiceError(
            f"this job asks for {wanted} GPUs, but only {len(devices)} are visible here. Lower its gpu under "
            f"resources_per_job, or widen {VISIBLE} ({os.environ.get(VISIBLE, 'not set')})."
        )
    roomy = [device for device in devices if memory is None or device.memory is None or device.memory >= memory]
    if wanted > len(roomy):
        most = max(device.memory for device in devices if device.memory)  # the memory of a MIG part is not known
        raise CoppiceError(
            f"this job asks for {memory} MB on each of {wanted} GPUs, but the largest here has {most} MB. Lower its "
            "gpu_mem_mb under resources_per_job."
        )


def _wait(
    held: contextlib.ExitStack, devices: Sequence[Device], wanted: int, memory: int | None, note_state: NoteState
) -> list[Device]:
    """Wait until enough devices are free, and return them; leaving `held` releases them."""
    pause, started, reminded = SHORTEST, time.monotonic(), None
    while True:
        with _mutex():
            taken = _take(held, devices, wanted, memory)
        if taken:
            if reminded is not None:
                logger.info("waited %.0f s for a GPU", time.monotonic() - started)
            note_state("running")
            return taken
        if reminded is None or time.monotonic() - reminded > REMINDER:
            reason = f"for {wanted} of {len(devices)} GPUs to be free"
            logger.info("waiting %s", reason)
            note_state("waiting", reason=reason)
            reminded = time.monotonic()
        time.sleep(pause)
        pause = min(LONGEST, 1.5 * pause)


def _take(held: contextlib.ExitStack, devices: Sequence[Device], wanted: int, memory: int | None) -> list[Device]:
    """Enter leases of `wanted` devices into `held` and return the devices; [] if fewer are free. Needs the mutex."""
    busy = _busy() if os.environ.get(SKIP_BUSY) else set()
    able = []
    for device in devices:
        used, leases = _used(device)
        # a process that computes there without a lease of ours belongs to another program
        foreign = device.uuid in busy and not leases
        if not foreign and _fits(device, used, leases, memory):
            able.append((used, device))
    if len(able) < wanted:
        return []
    able.sort(key=lambda pair: -pair[0])  # fill a partly used device before an unused one
    taken = [device for _, device in able[:wanted]]
    for device in taken:
        held.enter_context(_locked(device, memory))
    return taken


def _fits(device: Device, used: int, leases: int, memory: int | None) -> bool:
    if not leases:
        return True
    return memory is not None and device.memory is not None and used + memory <= device.memory


def _used(device: Device) -> tuple[int, int]:
    """Return (MB that leases of this device use, number of leases), and remove leases whose holder has ended."""
    used = leases = 0
    for path in device.folder().glob("*.lease"):
        if not path.is_file():  # not a lease of ours
            continue
        with contextlib.suppress(FileNotFoundError), open(path, "r+", encoding="utf-8", errors="replace") as file:
            if _try_lock(file):
                with contextlib.suppress(PermissionError):  # another user's: it is free, but only they can remove it
                    path.unlink()
                continue
            leases += 1
            text = file.read(20)
            used += int(text) if text.isdecimal() else device.memory or 2**31  # no number: the whole device
    return used, leases


@contextlib.contextmanager
def _locked(device: Device, memory: int | None) -> Iterator[None]:
    """Hold a lease on a device: a file with the MB asked for (empty: all), locked until its process ends."""
    folder = device.folder()
    _shared_folder(folder)
    path = folder / f"{os.getpid()}-{time.monotonic_ns()}.lease"
    with open(path, "w", encoding="utf-8") as file:
        os.chmod(path, 0o666)
        if not _try_lock(file):
            raise CoppiceError(f"{path}: cannot be locked. Set {FOLDER} to a folder on a local disk.")
        file.write("" if memory is None else str(memory))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _try_lock(file: TextIO) -> bool:
    """Take the kernel's lock on an open file; return False if another process holds it.

    This is `flock` itself, not a `filelock`: the kernel must end a lease with its process, and whoever looks for a free
    device asks each lease whether its holder lives, also leases of other users, without creating a file.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _mutex() -> Iterator[None]:
    """Let one process at a time choose devices, so that two jobs never each hold half of what both need."""
    root = _root()
    _shared_folder(root)
    with FileLock(root / "mutex", mode=0o666):
        yield


def _root() -> Path:
    given = os.environ.get(FOLDER)
    # not TMPDIR: Snakemake and schedulers set it to a new folder for each job
    return Path(given or ("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())) / "coppice-gpus"


def _shared_folder(folder: Path) -> None:
    """Make a folder in which every user of the machine can keep leases."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CoppiceError(f"{folder}: cannot hold leases ({error}). Set {FOLDER} to another folder.") from error
    with contextlib.suppress(PermissionError):
        os.chmod(folder, 0o1777)
