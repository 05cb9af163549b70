"""A copy of the workflow in its own folder, the small study, and a way to run snakemake there as a user would."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SNAKEMAKE = str(Path(sys.executable).parent / "snakemake")
SHIPPED = ("Snakefile", "workflow", "config", "profiles", "contrib", "envs")
SHOWN_LINES = 25  # number of lines of an output or a log that a failing test shows

# Recognizable secrets in the environment of every run: no file may contain them.
SECRETS = {"HF_TOKEN": "hf_PlantedTokenOfTheTests", "WANDB_API_KEY": "5ec2e7" * 6 + "cafe"}
OFFLINE_SWITCHES = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)  # the workflow must set these itself

ARMS = {
    "start": {"model": "Mistral", "config": "best_acc"},
    "data": {"val_size": 20},
    "base": {"learning_rate": 0.004, "batch_size": 8, "warmup_steps": 1},
    "metrics": {"tasks": ["piqa"], "perplexity": [], "limit": 10},
    "budget": {"max_steps": 4},
    "eval_steps": 2,
    "arms": [{"r": 2}, {"r": 8}],
}
# The small study: two models of different architectures, one of them with alpaca prompts, trained for a few steps and
# evaluated on a few items. It runs every stage, one ablation included.
STUDY = {
    "only": "{models: [Mistral, Qwen]}",
    "models": "{Qwen: {prompt: alpaca}}",
    "miniature": "{steps: 20}",
    "finetune": "{max_steps: 4, eval_steps: 2, save_steps: 2, warmup_steps: 1, data: {val_size: 20}}",
    "evaluate": "{zero_shot: {limit: 20, tasks: [piqa, arc_easy]}, "
    "cost: {prompt_tokens: 8, new_tokens: 2}, generation: {prompts: [The fox wears], new_tokens: 4}}",
    "candidates": "{prune: [{method: depth, ratio: 0.34}, {method: width, ratio: 0.5, importance: magnitude}]}",
    "ablations": json.dumps({"arms": ARMS, "presets": None, "order": None}),
}
# Its evaluations without timing, for studies whose tests do not look at speed
WITHOUT_COST = STUDY["evaluate"].replace("cost: {prompt_tokens: 8, new_tokens: 2}", "cost: {enabled: false}")
# The small study with one model
SMALL = STUDY | {"only": "{models: [Mistral]}"}
TARGETS = ("all", "ablation")


@functools.cache
def can_isolate_network():
    """Return True if this machine can start a process whose only network device is loopback."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(without_network("true"), capture_output=True, check=False).returncode == 0


def without_network(*command):
    """Return `command` as a command that runs without a network."""
    return ["unshare", "-rn", sys.executable, str(HERE / "alone.py"), *command]


def config_arguments(config):
    """Return a configuration as arguments of snakemake's command line."""
    return ["--config", *(f"{key}={value}" for key, value in config.items())] if config else []


@dataclass
class Checkout:
    """A copy of the workflow in `folder`.

    No run may look up or connect to another machine: every Python process of a run writes what it does to the file
    `watch` (see watch/sitecustomize.py).
    """

    folder: Path

    @property
    def watch(self):
        return self.folder.with_name(f"{self.folder.name}.watch")

    def watched(self, kind):
        """Return [(what, command line)] of the notes of one kind: started, outside or hub."""
        if not self.watch.exists():
            return []
        notes = map(json.loads, self.watch.read_text().splitlines())
        return [(what, " ".join(command)) for found, what, command in notes if found == kind]

    def environment(self):
        """Return the environment of runs: no offline switches, planted secrets, the watch in all Python processes."""
        kept = {
            name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", *OFFLINE_SWITCHES)
        }
        places = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(HERE / "watch")}
        paths = {name: os.pathsep.join(filter(None, [first, kept.get(name)])) for name, first in places.items()}
        return kept | SECRETS | paths | {"COPPICE_TEST_WATCH": str(self.watch)}

    def snakemake(self, *arguments, config=None, timeout=3000, cwd=None):
        """Run snakemake and return what `subprocess.run` returns; `stdout` also holds stderr."""
        done = subprocess.run(
            [SNAKEMAKE, *arguments, *config_arguments(config)],
            cwd=cwd or self.folder,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        assert not self.watched("outside")
        return done

    def run(self, *arguments, **options):
        """Run snakemake as `snakemake` does; the test fails if the run fails."""
        done = self.snakemake(*arguments, **options)
        assert done.returncode == 0, failure_report(
            done.args, done.returncode, done.stdout, options.get("cwd", self.folder)
        )
        return done

    def expect_failure(self, *arguments, **options):
        """Run snakemake and return its output; the run must end with exit status 1 and without a traceback."""
        done = self.snakemake(*arguments, **options)
        report = failure_report(done.args, done.returncode, done.stdout, options.get("cwd", self.folder))
        assert done.returncode == 1 and "Traceback" not in done.stdout, report
        return done.stdout

    def shell(self, command):
        """Run a shell command in the folder as a user would; the test fails if the command fails."""
        subprocess.run(command, shell=True, cwd=self.folder, env=self.environment(), check=True)

    def read(self, path):
        """Return the content of a JSON file of the study."""
        return json.loads((self.folder / path).read_text())


def failure_report(command, status, output, folder):
    """Return what a person needs to debug a run: its command, its last lines, and those of the logs it names."""
    lines = [f"$ cd {folder} && {shlex.join(map(str, command))}", f"exit status {status}; its last lines:"]
    lines += output.splitlines()[-SHOWN_LINES:]
    for name in dict.fromkeys(re.findall(r"^\s*log: (\S+)", output, re.MULTILINE)):
        path = Path(folder) / name
        if path.is_file():
            lines += [f"the last lines of {name}:", *path.read_text(errors="replace").splitlines()[-SHOWN_LINES:]]
    return "\n".join(lines)


def new(folder):
    """Copy what a user clones to `folder`.

    Compiled modules are copied too, so that jobs need not compile them again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in SHIPPED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part)
        else:
            shutil.copy(ROOT / part, folder / part)
    return Checkout(folder)


def copy_study(checkout, folder):
    """Copy a study with its links and time stamps, so that Snakemake finds nothing to do in the copy."""
    shutil.copytree(checkout.folder, folder, symlinks=True)
    other = Checkout(Path(folder))
    if checkout.watch.exists():
        shutil.copy(checkout.watch, other.watch)
    return other


def planned_jobs(done):
    """Return {rule: number of jobs} from the job stats of a dry run."""
    lines = done.stdout.partition("Job stats:")[2].partition("total")[0].splitlines()
    return {row[0]: int(row[1]) for line in lines if len(row := line.split()) == 2 and row[1].isdigit()}
