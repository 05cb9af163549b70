"""A GPU gives what a CPU gives: scores, gradients and a whole training; and what happens if real memory runs out.

`make test-gpu` runs these tests on a machine with a GPU; everywhere else they are skipped.
"""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_finetuning import SETTINGS, adapter_of, train
from test_finetuning import dataset as dataset
from test_finetuning_engine import adapted, assert_close, engine_gradients, padded_gradients, some_examples
from test_zero_shot_engine import harness, instances, multiple_choice, words

from coppice import data
from coppice.core import gpus
from coppice.stages.evaluate.zero_shot.harness_model import PrefixTreeLM

pytestmark = pytest.mark.skipif(
    not (os.environ.get("COPPICE_TEST_GPU") and torch.cuda.is_available()),
    reason="needs a GPU, and make test-gpu, which lets tests see it",
)

ARCHITECTURES = [("llama", {}), ("qwen2", {}), ("mistral", {"sliding_window": 7})]
JOB = """
from coppice.core import gpus
with gpus.lease(1) as taken:
    import torch
    print(torch.cuda.device_count(), len(taken), torch.ones(2, device="cuda").sum().item())
"""


def values(lm, pairs):
    return torch.tensor([value for value, _ in lm.loglikelihood(instances(pairs), disable_tqdm=True)])


@pytest.mark.parametrize(("architecture", "overrides"), ARCHITECTURES)
def test_log_likelihoods_equal_those_of_lm_eval_on_a_cpu(tiny_model, tiny_tokenizer, architecture, overrides):
    model, pairs = tiny_model(architecture, **overrides), multiple_choice()
    expected = values(harness(model, tiny_tokenizer), pairs)
    engine = PrefixTreeLM(pretrained=copy.deepcopy(model).to("cuda"), tokenizer=tiny_tokenizer)
    assert engine.shares_prefixes
    assert torch.allclose(values(engine, pairs), expected, atol=1e-3)


@pytest.mark.parametrize(("architecture", "overrides"), ARCHITECTURES)
def test_bfloat16_scores_are_as_close_to_exact_ones_as_those_of_lm_eval(
    tiny_model, tiny_tokenizer, architecture, overrides
):
    exact, pairs = tiny_model(architecture, initializer_range=0.05, **overrides), multiple_choice()
    expected = values(harness(exact, tiny_tokenizer), pairs)
    half = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    engine = PrefixTreeLM(pretrained=half, tokenizer=tiny_tokenizer)
    assert engine.shares_prefixes
    ours, theirs = ((values(lm, pairs) - expected).abs() for lm in (engine, harness(half, tiny_tokenizer)))
    assert ours.mean() <= 1.5 * theirs.mean() and ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("how", ["tree", "sorted"])
@pytest.mark.parametrize(("architecture", "overrides"), ARCHITECTURES)
def test_gradients_equal_those_of_padded_batches_on_a_cpu(tiny_model, architecture, overrides, how):
    model, examples = adapted(tiny_model(architecture, **overrides)), some_examples()
    expected = padded_gradients(model, examples)
    found, _ = engine_gradients(model.to("cuda"), examples, arrangement=how)
    assert_close({name: gradient.cpu() for name, gradient in found.items()}, expected, tolerance=1e-4)


def test_a_bfloat16_training_learns_and_resumes_from_its_checkpoint(tiny_checkpoint, dataset, tmp_path):
    folder, output = tiny_checkpoint("llama"), tmp_path / "out"
    record = train(folder, dataset, output)
    assert record["validation_loss"] < record["first_validation_loss"]
    assert record["provenance"]["device"] == torch.cuda.get_device_name(0)
    first = adapter_of(output)
    (output / "adapter_model.safetensors").unlink()
    train(folder, dataset, output)
    assert all(torch.equal(first[name], tensor) for name, tensor in adapter_of(output).items())


def test_out_of_memory_halves_the_tokens_at_a_time(tiny_checkpoint, tmp_path, caplog):
    """The activations of 5,600 tokens in 4 layers take many times the memory of the weights.

    The process may use half of what they take.
    """
    rng = random.Random(0)
    rows = [{"instruction": words(rng, 3), "input": "", "output": words(rng, 100)} for _ in range(64)]
    data.write("mine", {"train": rows}, tmp_path / "data")
    settings = SETTINGS | {"micro_batch_size": 64, "batch_size": 56, "data": SETTINGS["data"] | {"cutoff_len": 128}}
    folder = tiny_checkpoint("llama", hidden_size=256, intermediate_size=2048)
    whole = train(folder, tmp_path / "data/dataset.json", tmp_path / "whole", settings)
    torch.cuda.empty_cache()
    all_there_is = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(0.5 * whole["peak_memory_bytes"]["gpu"] / all_there_is)
    try:
        scarce = train(folder, tmp_path / "data/dataset.json", tmp_path / "scarce", settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scarce["tokens_at_a_time"] < whole["tokens_at_a_time"] and "out of memory at step" in caplog.text
    assert scarce["validation_loss"] == pytest.approx(whole["validation_loss"], rel=0.02)


def test_a_job_leases_a_device_that_the_driver_lists(tmp_path):
    devices = gpus.visible()
    assert devices and all(device.memory and device.uuid.startswith(("GPU-", "MIG-")) for device in devices)
    environment = os.environ | {"COPPICE_GPU_LEASES": str(tmp_path), "PYTHONPATH": str(Path(gpus.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", JOB], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "2.0"]
