"""A Slurm cluster for the tests: munge, controller and one node on 127.0.0.1, with two GPUs that do not exist."""

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "srun")
GPUS = 2


def missing():
    """Return why no Slurm can be started here, or None."""
    absent = [program for program in PROGRAMS if not _find(program)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root"


def _find(program):
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count):
    """Return `count` ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass
class Cluster:
    """A cluster whose files are in `folder`.

    `start` raises RuntimeError with the last lines of the daemons' logs if the node does not come up.
    """

    folder: Path
    cpus: int = 4
    memory_mb: int = 12000

    def start(self):
        for part in ("state", "spool", "munge", "dev", "bin"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        self._write_devices()
        self._write_configuration()
        self._start_munge()
        self._daemon("slurmctld", "-f", self.configuration)
        self._daemon("slurmd", "-f", self.configuration, "-N", "node")
        self._wait_until_idle()

    def stop(self):
        for file in (self.folder / "slurmd.pid", self.folder / "slurmctld.pid", self.folder / "munge/munged.pid"):
            if file.is_file() and (pid := file.read_text().strip()):
                subprocess.run(["kill", pid], check=False)
                for _ in range(100):
                    if not Path(f"/proc/{pid}").exists():
                        break
                    time.sleep(0.1)

    @property
    def configuration(self):
        return self.folder / "slurm.conf"

    def environment(self):
        """Return the environment of processes that use this cluster."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}:/usr/sbin"
        return os.environ | {"SLURM_CONF": str(self.configuration), "PATH": path}

    def ask(self, *command):
        """Return the output of a Slurm command."""
        done = subprocess.run(command, env=self.environment(), text=True, capture_output=True, check=True)
        return done.stdout

    def _daemon(self, program, *arguments):
        subprocess.run([_find(program), *map(str, arguments)], env=self.environment(), check=True)

    def _write_devices(self):
        """Make the GPUs: Slurm accepts only character devices, so these have the device number of /dev/null."""
        for number in range(GPUS):
            path = self.folder / f"dev/nvidia{number}"
            if not path.exists():
                os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
        devices = self.folder / f"dev/nvidia[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=node Name=gpu File={devices}\n")
        # The jobstep executor removes every SLURM_ variable before it calls srun, SLURM_CONF included, so this srun
        # sets it again.
        srun = self.folder / "bin/srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.configuration} exec {_find("srun")} "$@"\n')
        srun.chmod(0o755)

    def _write_configuration(self):
        control, node = free_ports(2)
        folder = self.folder
        settings = {
            "ClusterName": "coppice",
            "SlurmctldHost": f"{socket.gethostname().split('.')[0]}(127.0.0.1)",
            "SlurmctldPort": control,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge/munge.sock",
            "CredType": "cred/munge",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "slurmd.log",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "JobCompType": "jobcomp/filetxt",
            "JobCompLoc": folder / "jobs.txt",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SchedulerParameters": "sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0",
            "ReturnToService": 2,
            "KillWait": 5,
            "MinJobAge": 3600,
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        node = f"NodeName=node NodeHostname={socket.gethostname().split('.')[0]} NodeAddr=127.0.0.1 Port={node}"
        size = f"CPUs={self.cpus} SocketsPerBoard=1 CoresPerSocket={self.cpus} RealMemory={self.memory_mb}"
        lines += [f"{node} {size} Gres=gpu:{GPUS} State=UNKNOWN", "PartitionName=gpu Nodes=ALL Default=YES State=UP"]
        self.configuration.write_text("\n".join(lines) + "\n")

    def _start_munge(self):
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        files = [f"--{option}={folder / name}" for option, name in names.items()]
        self._daemon("munged", "--force", f"--key-file={key}", *files)

    def _wait_until_idle(self):
        for _ in range(200):
            done = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=self.environment(), text=True, capture_output=True, check=False
            )
            if done.stdout.strip() == "idle":
                return
            time.sleep(0.1)
        logs = [(self.folder / name).read_text()[-1500:] for name in ("slurmctld.log", "slurmd.log")]
        raise RuntimeError("the node did not become idle: " + done.stderr + "\n".join(logs))
