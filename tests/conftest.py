"""Fixtures for all tests: no network, no GPU but where tests are about one, one thread, and tiny models of the real
architectures."""

import functools
import gc
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# Before anything imports transformers or torch: they read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
if not os.environ.get("COPPICE_TEST_GPU"):  # set by `make test-gpu`; what all other tests expect are a CPU's numbers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import pytest
from filelock import FileLock

from tests.study import checkout as checkouts
from tests.study import outcome, running

# As jobs have it (see coppice.core.logs): a third of what importing torch and transformers takes is collecting garbage
gc.set_threshold(100_000, 50, 100)

# A machine that only says yes or no tries the same examples each time; a developer's tries new ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Of the files that take minutes, one that runs the small study begins, and those that wait for it come last.
FIRST = (
    "workflow/test_miniature_study.py",
    "workflow/test_candidates.py",
    "slurm/test_slurm.py",
    "workflow/test_small_study.py",
    "workflow/test_reruns.py",
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
    "faults/test_kills.py",
    "workflow/test_ablation.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the longest files: else one process of a test run is busy long after the other has ended.

    pytest-xdist keeps to this with `--no-loadscope-reorder`; by itself it begins with the files of most tests.
    """
    here = Path(__file__).parent
    places = {here / name: place - len(FIRST) for place, name in enumerate(FIRST)}
    places |= {here / name: place + 1 for place, name in enumerate(LAST)}
    items.sort(key=lambda item: places.get(item.path, 0))


def pytest_collection_finish():
    """What the tests' modules imported stays: else each training, which collects garbage, looks through all of it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_logging_is_left():
    """A command that runs in a test's own process starts logging to streams that are closed once the test is over."""
    yield
    for handler in list(logging.getLogger().handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(architecture, seed=0, **overrides)` builds a new random model, the same for the same arguments.

    architecture: llama, qwen2, qwen3 or mistral. Vocabulary 128, hidden 32, MLP 48, 4 layers, 8 query heads in 4
    KV groups, head_dim 4, untied embeddings; overrides are configuration keys. In eval mode, float32. Weights are
    large, and biases and norms random, so that logits spread widely and a lost bias shows.
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
            del settings["head_dim"]  # not a key of its configuration; hidden / heads gives the same 4
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
    """`token_batches(count=3, rows=2, length=16, seed=0)`: random calibration batches of ids 3...127."""
    import torch

    def build(count=3, rows=2, length=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, 128, (rows, length), generator=generator) for _ in range(count)]

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A word-level tokenizer of 128 ids (`w3` ... `w127` and three special ones), with a chat template."""
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
    """`tiny_checkpoint(architecture, **overrides)`: a new folder with a tiny model and its tokenizer."""
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
    """`new_checkout(name)`: a fresh copy of what a user clones."""
    return lambda name="checkout": checkouts.new(tmp_path_factory.mktemp(name))


def made_once(tmp_path_factory, name, make):
    """What `make()` returned, to be called by one of a test run's processes and kept as JSON for all of them."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    note = shared / f"{name}.json"
    with FileLock(shared / f"{name}.lock"):
        if not note.exists():
            note.write_text(json.dumps(make()))
    return json.loads(note.read_text())


@dataclass
class Finished(checkouts.Checkout):
    """A finished study that nobody changes: what its run said, and the CPU seconds of each script's longest job."""

    said: str
    lives: dict

    @functools.cached_property
    def numbers(self):
        return outcome.numbers(self.folder)


@pytest.fixture(scope="session")
def finished(new_checkout, tmp_path_factory):
    """The small study, run to its end by the README's own command, once for all processes of a test run."""

    def make():
        made = new_checkout("finished")
        with running.Running(made, *checkouts.TARGETS, "--resources", "gpu=2", cores=8, apart=True) as run:
            lives = running.lives(run)
            run.ends_well()
        return {"folder": str(made.folder), "said": run.text(), "lives": lives}

    found = made_once(tmp_path_factory, "small-study", make)
    return Finished(Path(found["folder"]), found["said"], found["lives"])


@pytest.fixture(scope="session")
def study(finished, tmp_path_factory):
    """A copy of the small study for the tests of one process, which leave it as they found it."""
    return checkouts.copied(finished, tmp_path_factory.mktemp("small") / "study")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the small study for one test, which may damage it."""
    return checkouts.copied(finished, tmp_path / "study")
