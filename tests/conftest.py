"""Fixtures for all tests: tiny models of the real architectures, and studies that a test run shares.

Tests use one thread, no network and no GPU, except for the GPU tests of `make test-gpu`.
"""

import functools
import gc
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# Set these before anything imports transformers or torch, which read them once, at import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
if not os.environ.get("COPPICE_TEST_GPU"):  # set by `make test-gpu`; other tests expect a CPU's numbers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import pytest
from filelock import FileLock

from tests.study import checkout as checkouts
from tests.study import outcome, running

# Jobs set the same thresholds (see coppice.core.logs): a third of the time that importing torch and transformers takes
# is garbage collection.
gc.set_threshold(100_000, 50, 100)

# CI tries the same examples each time, so that it fails for changes of the code alone. A developer's machine tries new
# ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Of the files that take minutes, one that runs the small study begins; those that wait for that study come last.
FIRST = (
    "workflow/test_miniature_study.py",
    "workflow/test_candidates.py",
    "slurm/test_slurm.py",
    "workflow/test_small_study.py",
    "workflow/test_reruns.py",
    "faults/test_kills.py",
    "workflow/test_bad_input.py",
    "unit/test_finetuning_resume.py",
    "unit/test_reporting.py",
    "unit/test_finetuning_engine.py",
    "faults/test_checksums.py",
    "faults/test_bad_configuration.py",
)
LAST = (
    "workflow/test_offline.py",
    "faults/test_runs_at_once.py",
    "faults/test_damage.py",
    "faults/test_disk.py",
    "workflow/test_ablation.py",
)


def pytest_collection_modifyitems(items):
    """Start with the longest files, so that no process works long after the others have ended.

    pytest-xdist keeps this order only with `--no-loadscope-reorder`; by default it starts with the files that hold the
    most tests.
    """
    here = Path(__file__).parent
    places = {here / name: place - len(FIRST) for place, name in enumerate(FIRST)}
    places |= {here / name: place + 1 for place, name in enumerate(LAST)}
    items.sort(key=lambda item: places.get(item.path, 0))


def pytest_collection_finish():
    """Exclude all imported modules from garbage collection.

    Each training collects garbage and would otherwise scan what the modules of all tests imported.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def close_log_handlers():
    """Remove log handlers after each test.

    A command that runs in the test's own process logs to streams that are closed once the test has ended.
    """
    yield
    for handler in list(logging.getLogger().handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def tiny_model():
    """Return `build(architecture, seed=0, **overrides)`, which makes a random model.

    The same arguments give the same model. The architecture is llama, qwen2, qwen3 or mistral; overrides are
    configuration keys. The model has vocabulary 128, hidden size 32, MLP size 48, 4 layers, 8 query heads in 4 KV
    groups, head_dim 4 and untied embeddings; it is float32 and in eval mode. Its weights are large, and its biases and
    norms random, so that logits spread widely and a lost bias changes them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)

    def build(architecture, seed=0, **overrides):
        settings = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if architecture == "qwen2":
            del settings["head_dim"]  # qwen2 has no such key; hidden_size / heads gives the same 4
        config = AutoConfig.for_model(architecture, **{**settings, **overrides})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, 0.0, 0.2)
                elif "norm" in name:
                    torch.nn.init.normal_(parameter, 1.0, 0.2)
        return model

    return build


@pytest.fixture(scope="session")
def token_batches():
    """Return `build(count=3, rows=2, length=16, seed=0)`, which makes random calibration batches of ids 3 to 127."""
    import torch

    def build(count=3, rows=2, length=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 128, (rows, length), generator=generator) for _ in range(count)]

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Return a word-level tokenizer with 128 ids (three special ones and `w3` to `w127`) and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )
    tokenizer.chat_template = "{% for m in messages %}w4 {{ m['content'] }} w5 {% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory):
    """Return `build(architecture, **overrides)`, which makes a new folder with a tiny model and its tokenizer."""
    made = {}

    def make(architecture, overrides):
        folder = tmp_path_factory.mktemp(f"made-{architecture}")
        tiny_model(architecture, **overrides).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    def build(architecture="llama", **overrides):
        key = repr((architecture, sorted(overrides.items())))
        if key not in made:
            made[key] = make(architecture, overrides)
        return shutil.copytree(made[key], tmp_path_factory.mktemp(architecture), dirs_exist_ok=True)

    return build


# Studies


@pytest.fixture(scope="session")
def new_checkout(tmp_path_factory):
    """Return a function that makes a fresh copy of what a user clones, in a new folder of the given name."""
    return lambda name="checkout": checkouts.new(tmp_path_factory.mktemp(name))


def make_once(tmp_path_factory, name, make):
    """Return what `make()` returned, as JSON: one process of a test run calls it, and the others read its result."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    result = shared / f"{name}.json"
    with FileLock(shared / f"{name}.lock"):
        if not result.exists():
            result.write_text(json.dumps(make()))
    return json.loads(result.read_text())


@dataclass
class Finished(checkouts.Checkout):
    """A finished study that no test changes.

    output: what its run printed
    cpu_seconds: script -> CPU seconds of that script's longest job
    """

    output: str
    cpu_seconds: dict

    @functools.cached_property
    def numbers(self):
        return outcome.numbers(self.folder)


@pytest.fixture(scope="session")
def finished(new_checkout, tmp_path_factory):
    """Run the small study to its end with the README's own command, once for all processes of a test run."""

    def make():
        made = new_checkout("finished")
        with running.Running(made, *checkouts.TARGETS, "--resources", "gpu=2", cores=8, offline=True) as run:
            cpu_seconds = running.longest_cpu_seconds(run)
            run.succeeds()
        return {"folder": str(made.folder), "output": run.text(), "cpu_seconds": cpu_seconds}

    found = make_once(tmp_path_factory, "small-study", make)
    return Finished(Path(found["folder"]), found["output"], found["cpu_seconds"])


@pytest.fixture(scope="session")
def study(finished, tmp_path_factory):
    """Return a copy of the small study that the tests of one process share and leave unchanged."""
    return checkouts.copy_study(finished, tmp_path_factory.mktemp("small") / "study")


@pytest.fixture
def study_copy(finished, tmp_path):
    """Return a copy of the small study for one test, which may damage it."""
    return checkouts.copy_study(finished, tmp_path / "study")
