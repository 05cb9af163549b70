"""Which GPU a job computes on: devices are leased, because Snakemake counts them and never says which one is free.

A lease is a file in a folder of the machine, locked by the process that computes: the kernel lets go of it when the
process ends, however that ends. All that a job asked for is taken at once or not at all. Devices are told apart by
their UUIDs, so that runs which name them by number, by UUID or as MIG parts get along. Where a cluster's scheduler
started the job for its rule, the scheduler has chosen already and nothing is leased.
"""

import contextlib
import csv
import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import CoppiceError

logger = logging.getLogger("coppice.gpus")

VISIBLE = "CUDA_VISIBLE_DEVICES"
GIVEN = "COPPICE_GPUS_GIVEN"  # set by the workflow in a job that a cluster's scheduler started
FOLDER = "COPPICE_GPU_LEASES"  # where leases lie, if not in the machine's folder for temporary files
SHORTEST, LONGEST = 0.05, 1.0  # seconds between two looks for a free device
REMINDER = 60.0  # seconds between two lines that say so


@dataclass(frozen=True)
class Device:
    """A GPU or a part of one: `name` as `CUDA_VISIBLE_DEVICES` takes it, its `uuid` and its memory in MB, if known."""

    name: str
    uuid: str
    memory: int | None = None

    def folder(self):
        """Where the leases of this device lie."""
        return _root() / self.uuid.replace("/", "_")


@contextlib.contextmanager
def lease(count, memory=None, tell=lambda *state, **facts: None, skip_busy=False):
    """Hold `count` GPUs while the block runs, with `CUDA_VISIBLE_DEVICES` set to them; torch must not be loaded yet.

    memory: MB of each that the job will use, where several may share one; None takes a device whole. tell(state,
    reason=...): keeps the job's status. skip_busy: leave out devices on which somebody else's process computes. With no
    GPU, with `count` 0, or where the scheduler has given the devices, nothing happens. Raises CoppiceError where fewer
    than `count` devices could ever be had.
    """
    devices = [] if not count or os.environ.get(GIVEN) else visible()
    if not devices:
        yield []
        return
    _check_possible(devices, count, memory)
    with contextlib.ExitStack() as held:
        taken = _wait(held, devices, count, memory, tell, skip_busy)
        before = os.environ.get(VISIBLE)
        os.environ[VISIBLE] = ",".join(device.name for device in taken)
        logger.info("on %s", ", ".join(f"GPU {device.name}" for device in taken))
        try:
            yield taken
        finally:
            os.environ.pop(VISIBLE) if before is None else os.environ.__setitem__(VISIBLE, before)


def visible():
    """The devices that this process may use: those of the user's `CUDA_VISIBLE_DEVICES`, else all that there are."""
    known = _listed()
    wanted = os.environ.get(VISIBLE)
    if wanted is None:
        return known or [Device(str(i), str(i)) for i in range(_counted())]
    names = []
    for name in (part.strip() for part in wanted.split(",")):
        if name in ("", "-1", "NoDevFiles"):
            break  # as CUDA reads it: what comes after is not visible
        names.append(name)
    return [_device(name, known) for name in names]


def _device(name, known):
    """The device called `name`: a number, a UUID or the beginning of one, or a MIG part."""
    for device in known:
        if name == device.name or (name.startswith("GPU-") and device.uuid.startswith(name)):
            return Device(name, device.uuid, device.memory)
    return Device(name, name)


def _listed():
    """What `nvidia-smi` lists; nothing where it is not there or does not answer."""
    rows = _ask_driver("--query-gpu=index,uuid,memory.total")
    return [Device(index, uuid, int(float(memory))) for index, uuid, memory in rows]


def _busy():
    """UUIDs of devices on which any process computes."""
    return {row[0] for row in _ask_driver("--query-compute-apps=gpu_uuid,pid")}


def _ask_driver(query):
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        logger.warning("nvidia-smi does not answer: %s", error)
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]


def _counted():
    """The number of GPUs that the driver shows to this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _check_possible(devices, count, memory):
    if count > len(devices):
        raise CoppiceError(
            f"this job asks for {count} GPUs, of which {len(devices)} can be seen here; lower its gpu under "
            f"resources_per_job, or widen {VISIBLE} ({os.environ.get(VISIBLE, 'not set')})"
        )
    roomy = [device for device in devices if memory is None or device.memory is None or device.memory >= memory]
    if count > len(roomy):
        raise CoppiceError(
            f"this job asks for {memory} MB on each of {count} GPUs, and the largest here has "
            f"{max(device.memory for device in devices)} MB; lower its gpu_mem_mb under resources_per_job"
        )


def _wait(held, devices, count, memory, tell, skip_busy):
    """The leased devices, once there are enough; what they hold is let go of when `held` is left."""
    pause, started, reminded = SHORTEST, time.monotonic(), None
    while True:
        with _mutex():
            taken = _take(held, devices, count, memory, skip_busy)
        if taken:
            if reminded is not None:
                logger.info("waited %.0f s for a GPU", time.monotonic() - started)
            tell("running")
            return taken
        if reminded is None or time.monotonic() - reminded > REMINDER:
            reason = f"for {count} of {len(devices)} GPUs to be free"
            logger.info("waiting %s", reason)
            tell("waiting", reason=reason)
            reminded = time.monotonic()
        time.sleep(pause)
        pause = min(LONGEST, 1.5 * pause)


def _take(held, devices, count, memory, skip_busy):
    """Leases of `count` devices, entered into `held`; an empty list where fewer are free. Under the mutex."""
    busy = _busy() if skip_busy else set()
    able = []
    for device in devices:
        used, leases = _used(device)
        foreign = device.uuid in busy and not leases
        if not foreign and _fits(device, used, leases, memory):
            able.append((used, device))
    if len(able) < count:
        return []
    able.sort(key=lambda pair: -pair[0])  # fill a device that is begun before another one
    taken = [device for _, device in able[:count]]
    for device in taken:
        held.enter_context(_locked(device, memory))
    return taken


def _fits(device, used, leases, memory):
    if not leases:
        return True
    return memory is not None and device.memory is not None and used + memory <= device.memory


def _used(device):
    """(MB in use by leases of this device, number of leases); leases whose holder is gone are removed."""
    used = leases = 0
    for path in device.folder().glob("*.lease"):
        with contextlib.suppress(FileNotFoundError), open(path, "r+", encoding="utf-8") as file:
            if _try_lock(file):
                path.unlink()
                continue
            leases += 1
            used += int(file.read() or device.memory or 2**31)
    return used, leases


@contextlib.contextmanager
def _locked(device, memory):
    """A lease on a device: a file with the MB asked for (empty: all), locked until its process is gone."""
    folder = device.folder()
    _shared_folder(folder)
    path = folder / f"{os.getpid()}-{time.monotonic_ns()}.lease"
    with open(path, "w", encoding="utf-8") as file:
        os.chmod(path, 0o666)
        if not _try_lock(file):
            raise CoppiceError(f"{path}: cannot be locked; set {FOLDER} to a folder on a local disk")
        file.write("" if memory is None else str(memory))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _try_lock(file):
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _mutex():
    """One process at a time looks for devices, so that two never take halves of what both need."""
    import fcntl

    root = _root()
    _shared_folder(root)
    path = root / "mutex"
    with open(path, "a", encoding="utf-8") as file:
        with contextlib.suppress(PermissionError):  # another user's, who has done it
            os.chmod(path, 0o666)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _root():
    given = os.environ.get(FOLDER)
    # not TMPDIR, which Snakemake and schedulers set anew for each job
    return Path(given or ("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())) / "coppice-gpus"


def _shared_folder(folder):
    """A folder that every user of the machine may lease in."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        os.chmod(folder, 0o1777)
