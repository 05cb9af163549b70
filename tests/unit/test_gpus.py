"""The GPU broker gives each device to one job at a time: real processes lease devices that do not exist."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Never
from unittest import mock

import pytest

from coppice.core import gpus, jobs
from coppice.core.errors import CoppiceError

PACKAGE = str(Path(gpus.__file__).parents[2])
# A job leases devices and notes when it wants, takes and gives them back, each note in one write.
JOB = """
import os, sys, time
from coppice.core import gpus, jobs
count, seconds, log = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
memory = int(sys.argv[4]) if len(sys.argv) > 4 else None
def note(what, names):
    with open(log, "a") as file:
        file.write(f"{time.monotonic()} {what} {os.getpid()} {names}\\n")
note("wants", "-")
with gpus.lease(count, memory):
    note("takes", os.environ["CUDA_VISIBLE_DEVICES"])
    time.sleep(seconds)
    note("gives", os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Set up a machine with two devices, without a driver, and keep its leases in a folder of the test."""
    monkeypatch.setenv("COPPICE_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name in ("COPPICE_GPUS_GIVEN", jobs.STARTED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


class NVMLError(Exception):
    """As in pynvml, where the class of each error number is derived from this one."""


class NotSupported(NVMLError):
    pass


class LibraryNotFound(NVMLError):
    pass


@pytest.fixture
def install_driver(monkeypatch):
    """Return a function that installs a fake of pynvml with `devices` [(uuid, MB or None)].

    Another user's process computes on the `busy` ones; `error` is what starting NVML raises.
    """

    def install(devices, busy=(), error=None):
        def memory(handle):
            if devices[handle][1] is None:
                raise NotSupported
            return SimpleNamespace(total=devices[handle][1] * 2**20)

        calls = {
            "nvmlInit": mock.Mock(side_effect=error),
            "nvmlShutdown": mock.Mock(),
            "nvmlDeviceGetCount": lambda: len(devices),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUUID": lambda handle: devices[handle][0],
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [4711] if devices[handle][0] in busy else [],
            "NVMLError": NVMLError,
            "NVMLError_NotSupported": NotSupported,
            "NVMLError_LibraryNotFound": LibraryNotFound,
        }
        monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**calls))

    return install


def start(machine, count=1, seconds=0.0, *memory):
    command = [sys.executable, "-c", JOB, str(count), str(seconds), str(machine / "log"), *map(str, memory)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": PACKAGE})


def events(machine):
    lines = [line.split() for line in (machine / "log").read_text().splitlines()]
    return sorted((float(when), what, int(pid), names) for when, what, pid, names in lines)


@contextlib.contextmanager
def lease_as_another_job(*arguments, **options):
    """Lease as another job would, which sees all devices."""
    before = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("ALL", "0,1")
    try:
        with gpus.lease(*arguments, **options) as taken:
            yield taken
    finally:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


def wait_for(machine, what, number=1) -> None:
    deadline = time.monotonic() + 600
    while sum(event[1] == what for event in events(machine)) < number if (machine / "log").exists() else True:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_two_hundred_jobs_and_random_kills_never_share_a_device(machine) -> None:
    """A killed job counts as ended when the signal is sent: a job that takes its device before that shares it."""
    chance = random.Random(1)
    running, started, ends, doomed, moments = [], 0, {}, set(), {}
    while started < 200 or running:
        while started < 200 and len(running) < 6:
            started += 1
            endless = started % 20 == 0  # this job is killed while it holds a device, the others end by themselves
            running.append(start(machine, 1, 60 if endless else chance.uniform(0, 0.02)))
            doomed |= {running[-1].pid} if endless else set()
            if not endless and chance.random() < 0.3:  # kills at any moment, however slow the machine is
                moments[running[-1].pid] = time.monotonic() + chance.uniform(0, 1)
        log = events(machine) if (machine / "log").exists() else []
        holding = {event[2] for event in log if event[1] == "takes"}
        for process in list(running):
            if process.pid in doomed & holding or time.monotonic() > moments.get(process.pid, float("inf")):
                ends.setdefault(process.pid, time.monotonic())
                process.send_signal(signal.SIGKILL)
            if process.poll() is not None:
                running.remove(process)
        time.sleep(0.01)
    holders = {}
    log = events(machine)
    killed = {event[2] for event in log if event[1] == "takes"} - {event[2] for event in log if event[1] == "gives"}
    assert len(killed) >= 10, "too few jobs were killed while they held a device"
    log += [(ends[pid], "gives", pid, "killed") for pid in killed]
    for _, what, pid, names in sorted(log):
        if what == "takes":
            assert names not in holders.values(), f"{names} went to two jobs"
            holders[pid] = names
        elif what == "gives":
            holders.pop(pid, None)
    assert sum(event[1] == "takes" for event in log) >= 100


def test_a_killed_job_releases_its_devices_at_once(machine) -> None:
    first = start(machine, 2, 60)
    wait_for(machine, "takes")
    second = start(machine, 2, 0)
    wait_for(machine, "wants", 2)
    first.kill()
    assert second.wait() == 0
    first.wait()


def test_takes_several_devices_together_or_not_at_all(machine) -> None:
    jobs = [start(machine, 2, 0.05) for _ in range(6)]
    assert [job.wait(60) for job in jobs] == [0] * 6
    taken = [event for event in events(machine) if event[1] in ("takes", "gives")]
    assert all(set(event[3].split(",")) == {"0", "1"} for event in taken)
    assert [event[1] for event in taken] == ["takes", "gives"] * 6


def test_identifies_a_device_by_its_uuid_under_any_name(machine, install_driver, monkeypatch) -> None:
    install_driver([("GPU-aaaa", 16000), ("GPU-bbbb", 16000)])
    with gpus.lease(1) as (first,):
        monkeypatch.setenv("ALL", "GPU-aa")
        assert (first.name, first.uuid) == ("0", "GPU-aaaa")
        with pytest.raises(TimeoutError), lease_within(0.5, 1):
            pass
        monkeypatch.setenv("ALL", "GPU-bbbb")
        with lease_as_another_job(1) as (second,):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == second.name == "GPU-bbbb"


@contextlib.contextmanager
def lease_within(seconds, *arguments, **options):
    def late(number, frame) -> Never:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with lease_as_another_job(*arguments, **options) as taken:
            signal.setitimer(signal.ITIMER_REAL, 0)
            yield taken
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_finds_all_devices_by_uuid_if_none_are_named(install_driver, monkeypatch) -> None:
    install_driver([("GPU-aaaa", 16000), ("GPU-bbbb", None)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [(device.name, device.memory) for device in gpus.visible()] == [("GPU-aaaa", 16000), ("GPU-bbbb", None)]
    assert gpus.largest() == 16000


@pytest.mark.parametrize(("error", "warned"), [(LibraryNotFound(), False), (NVMLError("unknown error"), True)])
def test_without_a_driver_that_answers_devices_keep_their_numbers(install_driver, caplog, error, warned) -> None:
    install_driver([("GPU-aaaa", 16000)], error=error)
    assert [(device.name, device.uuid) for device in gpus.visible()] == [("0", "0"), ("1", "1")]
    assert ("driver does not answer: unknown error" in caplog.text) == warned


def test_the_fake_driver_has_what_the_real_package_has(install_driver) -> None:
    sys.modules.pop("pynvml")
    real = pytest.importorskip("pynvml")
    install_driver([])
    missing = [name for name in vars(sys.modules["pynvml"]) if not hasattr(real, name)]
    assert not missing and issubclass(real.NVMLError_NotSupported, real.NVMLError)


def test_mig_devices_keep_their_names(machine, install_driver, monkeypatch) -> None:
    install_driver([("GPU-aaaa", 80000)])
    monkeypatch.setenv("ALL", "MIG-1111,MIG-2222")
    with lease_as_another_job(1) as first, lease_as_another_job(1) as second:
        assert [first[0].name, second[0].name] == ["MIG-1111", "MIG-2222"]


def test_small_jobs_share_a_device_within_its_memory(machine, install_driver, monkeypatch) -> None:
    install_driver([("GPU-aaaa", 10000), ("GPU-bbbb", 10000)])
    monkeypatch.setenv("COPPICE_GPUS_SHARE", "1")
    with (
        lease_as_another_job(1, 6000) as a,
        lease_as_another_job(1, 6000) as b,
        lease_as_another_job(1, 4000) as c,
        lease_as_another_job(1, 3000) as d,
    ):
        assert a[0].uuid != b[0].uuid and c[0].uuid != d[0].uuid
        with pytest.raises(TimeoutError), lease_within(0.5, 1, 2000):
            pass
        with pytest.raises(TimeoutError), lease_within(0.5, 1):  # the whole device
            pass
    with lease_as_another_job(1), lease_as_another_job(1), pytest.raises(TimeoutError), lease_within(0.5, 1, 10):
        pass
    monkeypatch.delenv("COPPICE_GPUS_SHARE")
    with (
        lease_as_another_job(1, 10),
        lease_as_another_job(1, 10),
        pytest.raises(TimeoutError),
        lease_within(0.5, 1, 10),
    ):
        pass


def test_skips_a_busy_device_if_configured(machine, install_driver, monkeypatch) -> None:
    install_driver([("GPU-aaaa", 10000), ("GPU-bbbb", 10000)], busy=["GPU-aaaa"])
    with gpus.lease(1) as taken:
        assert taken[0].uuid == "GPU-aaaa"
    monkeypatch.setenv("COPPICE_GPUS_SKIP_BUSY", "1")
    with gpus.lease(1) as taken:
        assert taken[0].uuid == "GPU-bbbb"


def test_reports_the_start_and_the_end_of_waiting(machine, caplog) -> None:
    caplog.set_level("INFO")
    states = []
    holder = start(machine, 2, 0.5)
    wait_for(machine, "takes")
    with gpus.lease(1, note_state=lambda state, reason=None: states.append((state, reason))):
        pass
    assert states == [("waiting", "for 1 of 2 GPUs to be free"), ("running", None)]
    assert "waiting for 1 of 2 GPUs" in caplog.text and "waited" in caplog.text
    holder.wait()


def test_rejects_a_request_that_can_never_be_met(machine, install_driver, monkeypatch) -> None:
    with pytest.raises(CoppiceError, match=r"asks for 3 GPUs.* 2 .*resources_per_job"), gpus.lease(3):
        pass
    install_driver([("GPU-aaaa", 8000), ("GPU-bbbb", 8000)])
    monkeypatch.setenv("COPPICE_GPUS_SHARE", "1")
    with pytest.raises(CoppiceError, match=r"asks for 9000 MB .* largest here has 8000"), gpus.lease(1, 9000):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-1111")  # the memory of a MIG part is not known
    with pytest.raises(CoppiceError, match=r"asks for 9000 MB on each of 2 .* largest here has 8000"):
        gpus.lease(2, 9000).__enter__()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        pytest.param({"CUDA_VISIBLE_DEVICES": ""}, 1, id="no device"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "-1"}, 1, id="all hidden"),
        pytest.param({"COPPICE_GPUS_GIVEN": "1"}, 2, id="given by a scheduler"),
        pytest.param({}, 0, id="none asked for"),
    ],
)
def test_takes_no_lease_if_there_is_nothing_to_lease(machine, monkeypatch, environment, wanted) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = os.environ["CUDA_VISIBLE_DEVICES"]
    with gpus.lease(wanted) as taken:
        assert taken == [] and os.environ["CUDA_VISIBLE_DEVICES"] == before
    assert not (machine / "leases").exists()


def test_leases_the_devices_of_an_interactive_allocation(machine, monkeypatch) -> None:
    """Snakemake runs inside the allocation: the scheduler gave the devices to Snakemake and not to any of its jobs."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with lease_as_another_job(1) as first, lease_as_another_job(1) as second:
        assert {first[0].name, second[0].name} == {"0", "1"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_leases_the_devices_of_a_group_to_its_jobs(machine, monkeypatch) -> None:
    """A scheduler gives a group of jobs what they request together, and each job sees all of it."""
    monkeypatch.setenv("COPPICE_GPUS_GIVEN", "1")
    with lease_as_another_job(1) as first, lease_as_another_job(1) as second:
        assert {first[0].name, second[0].name} == {"0", "1"}


def test_a_training_is_asked_to_stop_before_the_schedulers_time_limit(machine, monkeypatch) -> None:
    """The limit counts from the start of the scheduler's job, which begins before the training."""
    now = time.time()
    monkeypatch.setenv(jobs.STARTED, str(now - 43.5))
    stop_times = []
    before = signal.signal(signal.SIGTERM, lambda *arguments: stop_times.append(time.time()))
    try:
        jobs.stop_in_time({"runtime": 1})
        while not stop_times and time.time() < now + 60:
            time.sleep(0.05)
        assert now + 1.4 < stop_times[0] < now + 60 - 43.5, "a quarter of a minute before the minute is over"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("minutes", "waited", "expected"),
    [
        pytest.param(600, 20, 36000 - 120 - 20, id="two minutes ahead"),
        pytest.param(4, 20, 180 - 20, id="a quarter of a short limit"),
        pytest.param(600, 3000, 36000 - 120, id="after other jobs of its group"),
        pytest.param(0, 20, None, id="no limit"),
        pytest.param(600, None, None, id="no scheduler"),
    ],
)
def test_computes_when_to_ask_a_training_to_stop(monkeypatch, minutes, waited, expected) -> None:
    timers, now = [], time.time()
    monkeypatch.setattr(jobs.time, "time", lambda: now)
    monkeypatch.setattr(jobs.threading, "Timer", lambda seconds, *call: timers.append(seconds) or mock.Mock())
    if waited is not None:
        monkeypatch.setenv(jobs.STARTED, str(now - waited))
    jobs.stop_in_time({"runtime": minutes})
    assert timers == ([] if expected is None else [pytest.approx(expected)])
