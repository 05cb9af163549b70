"""A copy of the workflow in a folder of its own, the small study, and a way to run snakemake there as a user would."""

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
SHIPPED = ("Snakefile", "workflow", "config", "profiles", "envs")
LAST = 25  # lines of an output or a log that a failing test shows

# What no file may hold: recognisable secrets in the environment of every run
SECRETS = {"HF_TOKEN": "hf_PlantedTokenOfTheTests", "WANDB_API_KEY": "5ec2e7" * 6 + "cafe"}
OFF = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")  # the workflow has to see to it by itself

ARMS = {
    "start": {"model": "Mistral", "config": "best_acc"},
    "data": {"val_size": 20},
    "base": {"learning_rate": 0.004, "batch_size": 8, "warmup_steps": 1},
    "metrics": {"tasks": ["piqa"], "perplexity": [], "limit": 10},
    "budget": {"max_steps": 4},
    "eval_steps": 2,
    "arms": [{"r": 2}, {"r": 8}],
}
# The small study: two models of two architectures, one of them prompted as alpaca is, trained and tuned for a
# few steps and asked a few items. It goes through every stage, an ablation among them.
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
# The same with one model
SMALL = STUDY | {"only": "{models: [Mistral]}"}
TARGETS = ("all", "ablation")


@functools.cache
def may_be_alone():
    """Whether a process without any network but its own loopback device can be made here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(alone("true"), capture_output=True, check=False).returncode == 0


def alone(*command):
    """`command` in a network of its own."""
    return ["unshare", "-rn", sys.executable, str(HERE / "alone.py"), *command]


def words(config):
    """A configuration as Snakemake's command line takes it."""
    return ["--config", *(f"{key}={value}" for key, value in config.items())] if config else []


@dataclass
class Checkout:
    """A copy of the workflow.

    No run may look up or connect to anything outside this machine: every Python process of a run notes what it does in
    the file `watch` (see watch/sitecustomize.py).
    """

    folder: Path

    @property
    def watch(self):
        return self.folder.with_name(f"{self.folder.name}.watch")

    def watched(self, kind):
        """[(what, command line)] of the notes of one kind: started, outside, hub."""
        if not self.watch.exists():
            return []
        notes = map(json.loads, self.watch.read_text().splitlines())
        return [(what, " ".join(command)) for found, what, command in notes if found == kind]

    def environment(self):
        """What runs see: no switch of the hub, secrets, and the watch in every Python process."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", *OFF)}
        places = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(HERE / "watch")}
        paths = {name: os.pathsep.join(filter(None, [first, kept.get(name)])) for name, first in places.items()}
        return kept | SECRETS | paths | {"COPPICE_TEST_WATCH": str(self.watch)}

    def snakemake(self, *arguments, config=None, timeout=3000, cwd=None):
        """Run snakemake and return what `subprocess.run` does; `stdout` has its errors too."""
        done = subprocess.run(
            [SNAKEMAKE, *arguments, *words(config)],
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
        """The same; the test fails if the run does."""
        done = self.snakemake(*arguments, **options)
        assert done.returncode == 0, explained(done.args, done.returncode, done.stdout, options.get("cwd", self.folder))
        return done

    def refused(self, *arguments, **options):
        """What a run says that has to end with exit status 1 and without a traceback."""
        done = self.snakemake(*arguments, **options)
        said = explained(done.args, done.returncode, done.stdout, options.get("cwd", self.folder))
        assert done.returncode == 1 and "Traceback" not in done.stdout, said
        return done.stdout

    def shell(self, command):
        """Run a shell command as a user would in the folder; the test fails if it does."""
        subprocess.run(command, shell=True, cwd=self.folder, env=self.environment(), check=True)

    def read(self, path):
        """The content of a JSON file of the study."""
        return json.loads((self.folder / path).read_text())


def explained(command, status, output, folder):
    """What a person needs to know of a run: its command, its last lines, and those of the logs that it names."""
    lines = [f"$ cd {folder} && {shlex.join(map(str, command))}", f"exit status {status}; its last lines:"]
    lines += output.splitlines()[-LAST:]
    for name in dict.fromkeys(re.findall(r"^\s*log: (\S+)", output, re.MULTILINE)):
        path = Path(folder) / name
        if path.is_file():
            lines += [f"the last lines of {name}:", *path.read_text(errors="replace").splitlines()[-LAST:]]
    return "\n".join(lines)


def new(folder):
    """Copy what a user clones to `folder`, compiled modules too: jobs need not compile them once more."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in SHIPPED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part)
        else:
            shutil.copy(ROOT / part, folder / part)
    return Checkout(folder)


def copied(checkout, folder):
    """A copy of a study, with its links and time stamps, so that nothing is to be done in it."""
    shutil.copytree(checkout.folder, folder, symlinks=True)
    other = Checkout(Path(folder))
    if checkout.watch.exists():
        shutil.copy(checkout.watch, other.watch)
    return other


def planned(done):
    """Rule names in the job stats of a dry run, with their counts."""
    lines = done.stdout.partition("Job stats:")[2].partition("total")[0].splitlines()
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) == 2 and words[1].isdigit()}
