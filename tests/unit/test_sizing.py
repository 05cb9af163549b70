"""The resources that jobs request: by the size of the model, by the settings, and more with every attempt."""

import json

import pytest

from coppice.core import gpus, records
from coppice.models import estimates
from coppice.planning import job_resources
from coppice.stages.recover.lora import Lora
from coppice.stages.recover.training_request import TrainingSettings
from coppice.study import settings

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
GPU = estimates.Machine(gpus=1)
WHOLE = 2 * 8_030_261_248


@pytest.fixture
def study(tmp_path):
    """Return `load(parameters=None, config=None, model=None, **sections)`, which loads a study of one hub model.

    With `config`, the model's configuration looks as if it had been fetched.
    """

    def load(parameters=None, config=None, model=None, **sections):
        if config:
            folder = tmp_path / "resources/models/Big"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(config))
        entry = {"base": "org/big", "variant": "base", "family": "llama", "parameters": parameters} | (model or {})
        return settings.load({"models": {"Big": entry}, "resources": str(tmp_path / "resources"), **sections})

    return load


def requested(loaded, job="finetune", **options):
    return job_resources.Sizes(loaded).requested(job, "Big", **options)


def test_the_models_configuration_overrides_the_configured_number(study):
    loaded = study(parameters=10**9, config=LLAMA_8B)
    assert job_resources.Sizes(loaded).shape("Big").parameters == 8_030_261_248


def test_the_record_of_a_fetched_model_has_its_exact_number(study, tmp_path):
    sizes = job_resources.Sizes(study(config=LLAMA_8B | {"model_type": "gpt_neox"}))
    assert sizes.shape("Big").parameters != 7_000_000_000
    records.write(tmp_path / "resources/models/Big/model.json", {"parameters": 7_000_000_000})
    assert sizes.shape("Big").parameters == 7_000_000_000


def test_the_configured_number_counts_before_the_models_configuration_is_fetched(study):
    few, many = (requested(study(parameters=size)) for size in (10**9, 8 * 10**9))
    exact = requested(study(config=LLAMA_8B))
    assert few["gpu_mem_mb"] < many["gpu_mem_mb"] and few["runtime"] < many["runtime"]
    assert many["gpu_mem_mb"] == pytest.approx(exact["gpu_mem_mb"], rel=0.25)


@pytest.mark.parametrize("parameters", [4 * 10**7, 4 * 10**8, 10**9, 8 * 10**9, 7 * 10**10])
def test_a_guessed_shape_has_at_least_the_given_parameters_and_few_more(parameters):
    assert parameters <= estimates.shape_like(parameters).parameters <= 1.5 * parameters


def test_uses_the_size_of_a_model_as_soon_as_it_is_known(study, tmp_path):
    sizes = job_resources.Sizes(study())
    before = sizes.requested("evaluate", "Big")
    assert sizes.unknown() == ["Big"]
    (tmp_path / "resources/models/Big/snapshot").mkdir(parents=True)
    (tmp_path / "resources/models/Big/snapshot/config.json").write_text(json.dumps(LLAMA_8B))
    after = sizes.requested("evaluate", "Big")
    assert after["gpu_mem_mb"] > 3 * before["gpu_mem_mb"] and not sizes.unknown()


@pytest.mark.parametrize("job", ["prune", "score", "evaluate", "finetune"])
def test_every_attempt_requests_more(study, job):
    loaded = study(config=LLAMA_8B)
    first, second, third = (requested(loaded, job, attempt=attempt) for attempt in (1, 2, 3))
    assert set(first) == {"mem_mb", "gpu_mem_mb", "disk_mb", "runtime"}
    for key in first:
        assert first[key] < second[key] < third[key]
    assert second["mem_mb"] == pytest.approx(1.5 * first["mem_mb"], abs=2)


def test_the_users_values_override_estimates_and_grow_with_attempts(study):
    given = {"mem_mb": 5000, "gpu_mem_mb": 7000, "disk_mb": 300, "runtime": 9}
    loaded = study(config=LLAMA_8B, resources_per_job={"finetune": given})
    assert requested(loaded) == given
    assert requested(loaded, attempt=2) == {"mem_mb": 7500, "gpu_mem_mb": 10500, "disk_mb": 450, "runtime": 18}
    assert requested(loaded, "evaluate") != given


def test_estimates_stop_at_the_largest_gpu_but_the_users_values_do_not(study):
    assert requested(study(config=LLAMA_8B), attempt=3, largest=24000)["gpu_mem_mb"] == 24000
    loaded = study(parameters=10**9, resources_per_job={"finetune": {"gpu_mem_mb": 20000}})
    assert requested(loaded, attempt=3, largest=24000)["gpu_mem_mb"] == 24000
    loaded = study(parameters=10**9, resources_per_job={"finetune": {"gpu_mem_mb": 30000}})
    assert requested(loaded, largest=24000)["gpu_mem_mb"] == 30000


def test_small_jobs_share_a_device_without_configured_memory(study, monkeypatch, tmp_path):
    """The estimate reaches the broker as the memory of the lease."""
    monkeypatch.setenv(gpus.FOLDER, str(tmp_path / "leases"))
    monkeypatch.setenv(gpus.SHARE, "1")
    monkeypatch.setattr(gpus, "visible", lambda: [gpus.Device("0", "GPU-a", 80000)])
    memory = requested(study(parameters=10**9), "evaluate")["gpu_mem_mb"]
    with gpus.lease(1, memory) as first, gpus.lease(1, memory) as second:
        assert first == second


def test_a_machine_without_a_gpu_needs_host_memory_and_more_time(study):
    loaded = study(config=LLAMA_8B)
    assert requested(loaded, on_gpu=False)["gpu_mem_mb"] == 0
    assert requested(loaded, on_gpu=False)["mem_mb"] > 4 * 8030 * 1.2  # float32
    assert requested(loaded, on_gpu=False)["runtime"] > 50 * requested(loaded)["runtime"]


def finetuned(study_, gpus_, shape, **changes):
    """Return the Peak of a training on so many GPUs."""
    typed = TrainingSettings.model_validate(study_.finetune.model_dump() | changes)
    model, machine = study_.models["Big"].model_dump(), estimates.Machine(gpus=gpus_)
    return estimates.finetune(shape, model, typed, machine, Lora().memory(shape, typed))


def gpu_bytes(study_, gpus_=1, stage="finetune"):
    sizes = job_resources.Sizes(study_)
    shape, model, machine = sizes.shape("Big"), study_.models["Big"].model_dump(), estimates.Machine(gpus=gpus_)
    if stage == "finetune":
        return finetuned(study_, gpus_, shape).gpu
    return estimates.evaluate(shape, model, machine).gpu


def test_quantized_bases_need_about_a_quarter_or_half_of_the_memory(study, tmp_path):
    loaded = {kind: study(parameters=8 * 10**9, model={"quantize": kind}) for kind in (None, "8bit", "4bit")}
    sizes = {kind: gpu_bytes(one, stage="evaluate") for kind, one in loaded.items()}
    weights = 2 * job_resources.Sizes(loaded[None]).shape("Big").parameters
    assert 0.35 * weights < sizes[None] - sizes["8bit"] < 0.5 * weights
    assert 0.55 * weights < sizes[None] - sizes["4bit"] < 0.75 * weights


def test_only_sharding_or_a_device_map_spreads_the_weights(study):
    plain, sharded = study(parameters=8 * 10**9), study(parameters=8 * 10**9, finetune={"sharding": True})
    mapped = study(parameters=8 * 10**9, model={"device_map": "auto"})
    assert gpu_bytes(plain, 4) == gpu_bytes(plain, 1)
    weights = 2 * job_resources.Sizes(plain).shape("Big").parameters
    assert gpu_bytes(sharded, 1) - gpu_bytes(sharded, 4) > 0.5 * weights  # embeddings stay whole
    for stage in ("finetune", "evaluate"):
        assert gpu_bytes(mapped, 1, stage) - gpu_bytes(mapped, 4, stage) == pytest.approx(0.75 * weights, rel=0.01)
    huge = study(parameters=7 * 10**10)
    assert gpu_bytes(huge, 8) < 0.5 * gpu_bytes(huge, 1), "a model that fits no GPU is sharded by default"


def test_sharded_processes_load_a_huge_model_one_after_another(study):
    huge, plain = study(parameters=7 * 10**10), study(parameters=8 * 10**9)
    one, eight = host_bytes(huge, 1), host_bytes(huge, 8)
    assert eight - one == 7 * estimates.CUDA_PROCESS
    assert host_bytes(plain, 8) == pytest.approx(8 * host_bytes(plain, 1)), (
        "unsharded processes load it at the same time"
    )


def host_bytes(study_, gpus_):
    return finetuned(study_, gpus_, job_resources.Sizes(study_).shape("Big"), merge=False).host


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_the_configured_number_counts_for_a_mixture_of_experts(study, key):
    loaded = study(parameters=4 * 10**10, config=LLAMA_8B | {key: 8})
    assert job_resources.Sizes(loaded).shape("Big").parameters >= 4 * 10**10


def test_longer_rows_get_more_time(study):
    short, longer, longest = (
        requested(study(config=None, parameters=10**10, finetune={"data": {"cutoff_len": length}}))["runtime"]
        for length in (512, 1024, 4096)
    )
    assert short < longer < longest


@pytest.mark.parametrize(
    "evaluate",
    [
        {"zero_shot": {"num_fewshot": 4}},
        {"engine": "lm-eval"},
        {"zero_shot": {"tasks": ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
                                 "copa", "sciq"]}},
        {"perplexity": {"protocol": ["gptq-2048", "llmpruner-128"]}},
    ],
    ids=["few-shot examples", "lm-eval's own backend", "more tasks", "another protocol"],
)  # fmt: skip
def test_a_larger_evaluation_gets_more_time(study, evaluate):
    usual, more = (study(parameters=10**11, **given) for given in ({}, {"evaluate": evaluate}))
    assert requested(more, "evaluate")["runtime"] > requested(usual, "evaluate")["runtime"]


def test_gradient_checkpointing_and_a_lower_rank_need_less_memory(study):
    usual = gpu_bytes(study(parameters=8 * 10**9))
    assert gpu_bytes(study(parameters=8 * 10**9, finetune={"gradient_checkpointing": True})) < 0.9 * usual
    assert gpu_bytes(study(parameters=8 * 10**9, finetune={"lora": {"r": 256}})) > 1.2 * usual


def test_taylor_keeps_the_states_of_every_block_in_host_memory(study):
    loaded = study(config=LLAMA_8B)
    shape, model = estimates.shape_like(8 * 10**9), loaded.models["Big"].model_dump()
    calibration = loaded.calibration_of("Big").model_dump() | {"samples": 512, "length": 512}

    def host(**point):
        return estimates.prune(shape, model, [{"ratio": 0.25, **point}], calibration, GPU).host

    states = shape.layers * 512 * 512 * shape.hidden * 2
    assert host(method="width", importance="taylor") == estimates.CUDA_PROCESS + states  # the weights are freed by then
    assert host(method="width", importance="magnitude") < 0.5 * states


def test_pruning_requests_disk_for_every_candidate_of_its_job(study):
    points = [{"method": "depth", "ratio": 0.5}, {"method": "unstructured", "ratio": 0.5}]
    loaded = study(config=LLAMA_8B, candidates={"prune": points})
    first, second = loaded.candidates("Big")
    disks = [requested(loaded, "prune", candidate=name)["disk_mb"] for name in (first, second)]
    assert disks[0] < disks[1] and disks[1] > WHOLE / 10**6
    assert requested(loaded, "prune")["disk_mb"] > disks[1] + 0.5 * WHOLE / 10**6


def test_an_arm_of_all_weights_requests_memory_for_its_optimizer(study):
    ablations = {"one": {"start": {"model": "Big"}, "budget": {"max_steps": 500}, "arms": ["light", {"train": "all"}]}}
    loaded = study(parameters=10**9, ablations=ablations)
    sizes = job_resources.Sizes(loaded)
    light, everything = (sizes.arm("one", name, True) for name in loaded.ablations["one"].arms)
    parameters = sizes.shape("Big").parameters
    assert 13 * parameters < everything.gpu - light.gpu < 16 * parameters  # 16 bytes a weight for 2
    assert everything.operations > light.operations and everything.disk > light.disk + 20 * parameters
    assert sizes.granted("finetune", light, attempt=2)["mem_mb"] > sizes.granted("finetune", light)["mem_mb"]


def test_a_teacher_adds_its_weights_and_its_passes(study):
    loaded = [study(8_030_261_248, finetune={"objective": {"kl": kl}, "max_steps": 10}) for kl in (0, 1)]
    without, taught = (job_resources.Sizes(one).need("finetune", "Big", True) for one in loaded)
    assert taught.gpu - without.gpu >= 0.99 * WHOLE
    # LoRA takes four operations per parameter and token, and the teacher two
    assert taught.operations == pytest.approx(1.5 * without.operations)
