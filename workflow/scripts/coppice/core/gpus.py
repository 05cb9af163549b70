"""Which GPU a job computes on: devices are leased, because Snakemake counts them and never says which one is free.

A lease is a file in a folder of the machine, locked by the process that computes: the kernel lets go of it when the
process ends, however that ends. All that a job asked for is taken at once or not at all. Devices are told apart by
their UUIDs, so that runs which name them by number, by UUID or as MIG parts get along. Where a cluster's scheduler
started the job for its rule, the scheduler has chosen already and nothing is leased; a group of jobs that it started as
one leases what it was given.
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
SHARE, SKIP_BUSY = "COPPICE_GPUS_SHARE", "COPPICE_GPUS_SKIP_BUSY"  # set by the workflow from its configuration
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
def lease(wanted, memory=None, note_state=lambda *state, **facts: None):
    """Hold `wanted` GPUs while the block runs, with `CUDA_VISIBLE_DEVICES` set to them; torch must not be loaded yet.

    memory: MB of each that the job will use; without it, or without `SHARE` in the environment, a device is taken
    whole. note_state(state, reason=...) keeps its status. With `SKIP_BUSY` devices on which somebody else's process
    computes are left out. With no GPU, with `wanted` 0, or where the scheduler has given just those devices, nothing
    happens; where it has given more, other jobs of the same group share them. Raises CoppiceError where fewer than
    `wanted` devices could ever be had.
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


def visible():
    """The devices that this process may use: those of the user's `CUDA_VISIBLE_DEVICES`, else all that there are."""
    known = _listed()
    wanted = os.environ.get(VISIBLE)
    if wanted is None:
        # by UUID: CUDA and nvidia-smi may count the devices of a machine in another order
        return [Device(d.uuid, d.uuid, d.memory) for d in known] or [
            Device(str(place), node) for place, node in enumerate(_nodes())
        ]
    names = []
    for name in (part.strip() for part in wanted.split(",")):
        if name in ("", "-1", "NoDevFiles"):
            break  # as CUDA reads it: what comes after is not visible
        names.append(name)
    return [_device(name, known) for name in names]


def largest():
    """MB of the largest of the visible devices; None where no driver tells."""
    return max((device.memory for device in visible() if device.memory), default=None)


def _device(name, known):
    """The device called `name`: a number, a UUID or the beginning of one, or a MIG part."""
    for device in known:
        if name == device.name or name == device.uuid or (name.startswith("GPU-") and device.uuid.startswith(name)):
            return Device(name, device.uuid, device.memory)
    return Device(name, name)


def _listed():
    """What `nvidia-smi` lists; nothing where it is not there or does not answer."""
    rows = _ask_driver("--query-gpu=index,uuid,memory.total")
    return [Device(index, uuid, int(memory) if memory.isdigit() else None) for index, uuid, memory in rows]


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


def configure(share, skip_busy, given):
    """Tell this process's jobs how devices are shared out; `given`: a scheduler has chosen them for this very job."""
    for name, wanted in ((SHARE, share), (SKIP_BUSY, skip_busy), (GIVEN, given)):
        if wanted:
            os.environ[name] = "1"


def present():
    """Whether this machine has a GPU at all, asked without waking the driver."""
    return bool(shutil.which("nvidia-smi") or _nodes())


def _nodes():
    """Device files, in the order in which CUDA counts those that a container has: their numbers are the machine's."""
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [f"nvidia{number}" for number in sorted(int(number) for number in numbers if number.isdigit())]


def count():
    """The number of GPUs that the driver shows to this process; 0 where there is no driver.

    Not before a lease: the driver reads `CUDA_VISIBLE_DEVICES` once, when it is first called.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(found)):
        return 0
    return found.value


def _check_possible(devices, wanted, memory):
    if wanted > len(devices):
        raise CoppiceError(
            f"this job asks for {wanted} GPUs, of which {len(devices)} can be seen here; lower its gpu under "
            f"resources_per_job, or widen {VISIBLE} ({os.environ.get(VISIBLE, 'not set')})"
        )
    roomy = [device for device in devices if memory is None or device.memory is None or device.memory >= memory]
    if wanted > len(roomy):
        raise CoppiceError(
            f"this job asks for {memory} MB on each of {wanted} GPUs, and the largest here has "
            f"{max(device.memory for device in devices)} MB; lower its gpu_mem_mb under resources_per_job"
        )


def _wait(held, devices, wanted, memory, note_state):
    """The leased devices, once there are enough; what they hold is let go of when `held` is left."""
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


def _take(held, devices, wanted, memory):
    """Leases of `wanted` devices, entered into `held`; an empty list where fewer are free. Under the mutex."""
    busy = _busy() if os.environ.get(SKIP_BUSY) else set()
    able = []
    for device in devices:
        used, leases = _used(device)
        foreign = device.uuid in busy and not leases
        if not foreign and _fits(device, used, leases, memory):
            able.append((used, device))
    if len(able) < wanted:
        return []
    able.sort(key=lambda pair: -pair[0])  # fill a device that is begun before another one
    taken = [device for _, device in able[:wanted]]
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
        if not path.is_file():  # none of ours
            continue
        with contextlib.suppress(FileNotFoundError), open(path, "r+", encoding="utf-8", errors="replace") as file:
            if _try_lock(file):
                with contextlib.suppress(PermissionError):  # another user's: free, but theirs to remove
                    path.unlink()
                continue
            leases += 1
            said = file.read(20)
            used += int(said) if said.isdecimal() else device.memory or 2**31  # no number: the whole device
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CoppiceError(
            f"{folder}: no leases can be kept there ({error}); set {FOLDER} to another folder"
        ) from error
    with contextlib.suppress(PermissionError):
        os.chmod(folder, 0o1777)
