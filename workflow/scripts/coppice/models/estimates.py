"""Estimate from its configuration alone what a model needs: parameters, bytes and peak memory.

The workflow calls this while Snakemake parses it, so this module imports nothing slow. A peak is the sum of what is in
memory at the same time (weights, activations of the tokens at a time, a chunk of logits, the adapter with its
optimizer) and of what an empty process takes.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from coppice.core.aliases import PathLike, Record
from coppice.core.json_text import parsed

from . import dimensions

MB = 10**6
PROCESS = 540 * MB  # Python, torch, transformers and peft, before any model; measured on a CPU
TRAINING = 200 * MB  # in a training besides the model: examples, trainer, optimizer, fragmented memory
CUDA_PROCESS = 4000 * MB  # a process with CUDA's libraries; not measured
CUDA_CONTEXT = 800 * MB  # on a GPU before any model, and what the allocator cannot use; not measured
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED = {"4bit": 0.55, "8bit": 1.05}  # bytes per weight, scales included
CHUNK = 256 * MB  # float32 logits in memory at a time in training and for Taylor importance, see `output_head`
SCORED_CHUNK = 2 * 64 * MB  # the same in evaluation, with their logarithms
PROBES = 4 * 256 * 4  # bytes per token of the vocabulary, to compare the logits with and without an adapter
EVALUATED_TOKENS = 16384  # the most at a time on a GPU
CPU_TOKENS = 512  # at a time per thread on a CPU, in training and in evaluation
WINDOW_TOKENS = 2048  # in one perplexity window, or in several shorter ones that run together
CALIBRATED_TOKENS = 4096  # at a time in pruning
READ_AND_SAVED = 0.3  # of the weights: what reading or writing a checkpoint takes besides them
BACKWARD = 1.25  # times the activations that the layers keep, for the gradients of these
BLOCK_BACKWARD = 2.5  # the same for a single layer whose weights have gradients, too
SORTING_BYTES = 28  # per weight of the largest matrix, while its scores are ranked
USUAL_GPU = 80 * 10**9  # bytes of memory of a GPU that is not known yet
ROOM_FOR_WEIGHTS = 0.7  # of a GPU; the rest is for activations, the adapter and its optimizer
WIDER = 4
# Names of linear layers of T5, BART and CLIP -> those of Llama with the same sizes
OTHER_NAMES = {
    **{"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "out_proj": "o_proj"},
    **{
        "wi_0": "gate_proj",
        "wi_1": "up_proj",
        "wi": "up_proj",
        "fc1": "up_proj",
        "wo": "down_proj",
        "fc2": "down_proj",
    },
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
ADAPTER_BYTES = 16  # per trained parameter: itself in float32, its gradient and Adam's two moments


class Peak(NamedTuple):
    """The most bytes that a job takes of the machine's memory, and of the memory of each of its GPUs."""

    host: int
    gpu: int


@dataclass(frozen=True)
class Machine:
    """Where a job computes: on `gpus` GPUs, or, if that is 0, on the CPU with `threads` threads."""

    gpus: int = 0
    threads: int = 1


@dataclass(frozen=True)
class TrainingMemory:
    """What decides the memory of a training, besides the sizes of the model.

    Attributes:
        parameters: how many are trained.
        frozen: whether the model's weights stay frozen, as loaded, beside what is trained. If not, they are what is
            trained, in float32.
        kept_bytes: what each layer keeps per token for the backward pass, in addition to its own activations.
        teacher: the sizes of a second model, which is run on the same tokens.
    """

    parameters: int
    frozen: bool
    kept_bytes: int = 0
    teacher: "Shape | None" = None


class LoraSettings(Protocol):
    """What is read of the section `finetune.lora`."""

    r: int
    target_modules: str | list[str]


class DataSettings(Protocol):
    """What is read of the section `finetune.data`."""

    cutoff_len: int


class FinetuneSettings(Protocol):
    """What is read of the section `finetune`."""

    micro_batch_size: int
    gradient_checkpointing: bool | None
    sharding: bool | None
    merge: bool

    @property
    def data(self) -> DataSettings:
        """The section `finetune.data`."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model as those of a decoder with Llama's architecture, which text models resemble."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    biases: int  # of the attention of one layer
    norms: int  # weights of the norms of one layer
    others: int = 0  # parameters outside layers and embeddings: cross-attention, a vision tower
    counted: int | None = None  # the parameters of the model itself, which may be built a little differently

    @property
    def layer(self) -> int:
        """The number of parameters of one layer."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.inner + self.biases + self.norms

    @property
    def parameters(self) -> int:
        """The number of all parameters; tied ones count once."""
        if self.counted:
            return self.counted
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer + self.hidden + self.others


def shape_of(path: PathLike) -> Shape | None:
    """Return the Shape in a config.json; None if there is no such file or the model is of another kind."""
    try:
        return shape_in(parsed(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def shape_in(config: Record) -> Shape | None:
    """Return the Shape in the content of a config.json; None for another kind of model, such as one with experts."""
    try:
        whole, found, config = config, dimensions.of(config), config.get("text_config") or config
        hidden, heads = found.hidden, found.heads
        kv_heads = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or config.get("d_kv") or hidden // heads
        # GPT-2 and its like have MLPs of four times the width unless they say otherwise
        sizes = found.layers, hidden, found.inner or WIDER * hidden, heads, kv_heads, head
        vocabulary, kind = config["vocab_size"], config["model_type"]
        if None in sizes or any((config.get(name) or 0) > 1 for name in EXPERTS):
            return None
    except (AttributeError, KeyError, TypeError, ZeroDivisionError):
        return None
    # Qwen2 has biases on queries, keys and values without a key for them in its configuration
    biases = head * (heads + 2 * kv_heads) if kind == "qwen2" else 0
    if config.get("attention_bias"):
        biases = head * (heads + 2 * kv_heads) + hidden
    norms = 2 * hidden + (2 * head if kind == "qwen3" else 0)  # Qwen3 also normalizes queries and keys
    tied = whole.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if not whole.get("is_encoder_decoder"):
        return Shape(*sizes, vocabulary, bool(tied), biases, norms, others=dimensions.vision_parameters(whole))
    decoder = config.get("num_decoder_layers") or config.get("decoder_layers") or found.layers
    crossing = decoder * 4 * hidden * heads * head
    sizes = found.layers + decoder, *sizes[1:]
    return Shape(*sizes, vocabulary, tied is not False, biases, norms, others=crossing)


@functools.cache
def shape_like(parameters: int) -> Shape:
    """Return a Shape of Llama's proportions with at least `parameters`: layers = width / 128, MLP = 3.5 widths."""
    for hidden in range(128, 2**16, 128):
        vocabulary = 128256 if hidden >= 2048 else 32000
        heads = hidden // 128
        sizes = max(2, heads), hidden, 7 * hidden // 2, heads, min(8, heads), 128
        shape = Shape(*sizes, vocabulary, tied=hidden < 2048, biases=0, norms=2 * hidden)
        if shape.parameters >= parameters:
            break
    return shape


def width_of(dtype: str | None, machine: Machine) -> int:
    """Return the bytes of a value in `dtype`; None is bfloat16 on a GPU and float32 on a CPU (`models.dtype_of`)."""
    return BYTES[dtype or ("bfloat16" if machine.gpus else "float32")]


def weight_bytes(shape: Shape, width: int, quantize: str | None = None) -> int:
    """Return the bytes of the loaded weights, `width` each; embeddings and output layer are never quantized."""
    if not quantize:
        return shape.parameters * width
    layers = shape.layers * shape.layer
    return int(layers * QUANTIZED[quantize] + (shape.parameters - layers) * width)


def adapter_parameters(shape: Shape, lora: LoraSettings) -> int:
    """Return the number of trained parameters of LoRA with rank `lora.r` on the modules that its settings name."""
    return shape.layers * lora.r * sum(into + out for into, out in _adapted(shape, lora))


def adapted_inputs(shape: Shape, lora: LoraSettings) -> int:
    """Return the sum of the input widths of the modules in one layer that LoRA's settings name."""
    return sum(into for into, _ in _adapted(shape, lora))


def _adapted(shape: Shape, lora: LoraSettings) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of each linear layer in a decoder layer that gets an adapter."""
    wide, narrow = shape.head * shape.heads, shape.head * shape.kv_heads
    widths = {
        "q_proj": (shape.hidden, wide),
        "k_proj": (shape.hidden, narrow),
        "v_proj": (shape.hidden, narrow),
        "o_proj": (wide, shape.hidden),
        "gate_proj": (shape.hidden, shape.inner),
        "up_proj": (shape.hidden, shape.inner),
        "down_proj": (shape.inner, shape.hidden),
    }
    groups = {"attention": list(widths)[:4], "mlp": list(widths)[4:], "all-linear": list(widths)}
    groups |= {other: [name] for other, name in OTHER_NAMES.items()}
    wanted = lora.target_modules
    names = [part for name in ([wanted] if isinstance(wanted, str) else wanted) for part in groups.get(name, [name])]
    return [widths[name] for name in dict.fromkeys(names) if name in widths]


def kept_values(hidden: int, inner: int) -> int:
    """Return how many values a decoder layer keeps per token: about 8 states of the hidden width, 4 of the MLP's."""
    return 8 * hidden + 4 * inner


def finetune(
    shape: Shape, model: Record, settings: FinetuneSettings, machine: Machine, trained: TrainingMemory
) -> Peak:
    """Return the Peak of a fine-tuning job.

    Each of several GPUs holds all weights, or its share of them with `sharding` or `device_map`.

    Args:
        shape: the model's Shape.
        model: {dtype, quantize, device_map}.
        settings: the section `finetune`.
        machine: where the job runs.
        trained: the TrainingMemory of what is trained.
    """
    width, longest = width_of(model["dtype"], machine), settings.data.cutoff_len
    tokens = settings.micro_batch_size * longest
    tokens = tokens if machine.gpus else max(longest, min(tokens, CPU_TOKENS * machine.threads))
    whole = weight_bytes(shape, width, model["quantize"])
    sharded = machine.gpus > 1 and not model["device_map"] and shards(whole, model, settings)
    held, beside = _held(shape, whole, width, model, sharded, machine), 0
    if trained.teacher:  # loaded like the model; its logits and their gradient make twice as many chunks again
        beside = weight_bytes(trained.teacher, width, model["quantize"]) + 2 * _chunk(shape, tokens, width)
    if not trained.frozen:
        sharded, held, width = False, 0, 4
    layers = 1 if settings.gradient_checkpointing else shape.layers
    # each layer also keeps a row of the attention mask per token
    kept = BACKWARD * tokens * layers * (layer_bytes(shape, width) + trained.kept_bytes + width * tokens)
    boundaries = tokens * shape.layers * shape.hidden * width if layers == 1 else 0
    # at the end the logits of one example are compared, with and without the adapter
    logits = max(_chunk(shape, tokens, width), 2 * longest * shape.vocabulary * width)
    device = held + beside + ADAPTER_BYTES * trained.parameters + kept + boundaries + logits + TRAINING
    merged = whole if settings.merge else 0
    processes = 1 if model["device_map"] else machine.gpus
    # processes that share the weights load them one after another
    return _placed(device, whole, merged, model, machine, processes, at_once=1 if sharded else processes)


def _chunk(shape: Shape, tokens: int, width: int) -> float:
    """Return the bytes of a chunk of the logits of `tokens` tokens: float32, plus the model's dtype if that differs."""
    return min(CHUNK, 4 * tokens * shape.vocabulary) * (1 if width == 4 else 1.5)


def _held(shape: Shape, whole: int, width: int, model: Record, sharded: bool, machine: Machine) -> float:
    """Return the bytes of weights on one device."""
    if model["device_map"] and machine.gpus > 1:
        return whole / machine.gpus
    if sharded:
        embeddings = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden * width
        return embeddings + (whole - embeddings) / machine.gpus + 2 * shape.layer * width  # two layers gathered
    return whole


def shards(whole: int, model: Record, settings: FinetuneSettings) -> bool:
    """Return whether processes share `whole` bytes of weights: as set, or by default if a usual GPU is too small."""
    if settings.sharding is not None or model["quantize"]:
        return bool(settings.sharding)
    return whole > ROOM_FOR_WEIGHTS * USUAL_GPU


def layer_bytes(shape: Shape, width: int) -> int:
    """Return the bytes that a decoder layer keeps per token for its backward pass, without the attention mask's row.

    Counted on a Llama in training: 6 states of the hidden width and 3 of the MLP's.
    """
    return width * (6 * shape.hidden + 3 * shape.inner)


def evaluate(shape: Shape, model: Record, machine: Machine) -> Peak:
    """Return the Peak of evaluating a dense, pruned or fine-tuned model, which is also that of scoring candidates."""
    width = width_of(model["dtype"], machine)
    whole = weight_bytes(shape, width, model["quantize"])
    tokens = EVALUATED_TOKENS if machine.gpus else max(WINDOW_TOKENS, CPU_TOKENS * machine.threads)
    forwards = tokens * kept_values(shape.hidden, shape.inner) * width + SCORED_CHUNK
    probes = PROBES * shape.vocabulary
    if not machine.gpus:
        forwards = max(forwards, probes, READ_AND_SAVED * whole)
    return _placed(_spread(whole, model, machine) + forwards, whole, probes, model, machine)


def prune(
    shape: Shape, model: Record, points: Sequence[Record], calibration: Mapping[str, int], machine: Machine
) -> Peak:
    """Return the Peak of pruning at all `points` of a grid, one after another. calibration: {samples, length}."""
    width = width_of(model["dtype"], machine)
    whole = weight_bytes(shape, width, model["quantize"])
    needs = [_pruning(shape, point, calibration, width) for point in points]
    device, host = (max(need[place] for need in needs) for place in (0, 1))
    if not machine.gpus:
        device = max(device + host, READ_AND_SAVED * whole)
    return _placed(_spread(whole, model, machine) + device, whole, max(host, whole), model, machine)


def pruning_operations(shape: Shape, points: Sequence[Record]) -> int:
    """Return the operations of pruning at all `points`, per token of the calibration text."""
    # 2 per parameter for the forward pass and 4 for the gradient of every weight. For perplexity, half of the model
    # runs as often as it has blocks.
    each = [6 if point.get("importance") != "perplexity" else 2 + shape.layers for point in points]
    return shape.parameters * sum(n * point.get("steps", 1) for n, point in zip(each, points, strict=True))


def _spread(whole: int, model: Record, machine: Machine) -> float:
    """Return the bytes of weights on one device if one process holds all of them."""
    return whole / machine.gpus if model["device_map"] and machine.gpus else whole


def _pruning(shape: Shape, point: Record, calibration: Mapping[str, int], width: int) -> tuple[float, float]:
    """Return (bytes on the device, bytes on the host) that one point takes besides the weights."""
    calibrated = calibration["samples"] * calibration["length"]
    tokens = min(CALIBRATED_TOKENS, calibrated)
    forwards = tokens * kept_values(shape.hidden, shape.inner) * width
    if point["method"] == "unstructured":
        return _zeroing(shape, point, forwards), shape.hidden * calibrated * width if _walks(point) else 0
    if point.get("importance") == "perplexity":
        return forwards + _chunk(shape, tokens, width), shape.layers * tokens * shape.hidden * width
    if not point.get("importance", "").startswith("taylor"):
        return forwards, 0
    # the host keeps the states before each block, and the gradients of one block are summed in float32, those of second
    # order as squares, too
    block = BLOCK_BACKWARD * forwards + shape.layer * (4 + width + 4 * (point["importance"] != "taylor"))
    return block + _chunk(shape, tokens, width), shape.layers * calibrated * shape.hidden * width


def _walks(point: Record) -> bool:
    """Return whether a point of the method unstructured goes block by block, with the states before it on the host."""
    return point.get("importance", "wanda") in ("wanda", "sparsegpt")


def _zeroing(shape: Shape, point: Record, forwards: float) -> float:
    """Return the bytes on the device that zeroing single weights takes besides the weights."""
    widest = max(shape.inner, shape.head * shape.heads)
    if point.get("importance") != "sparsegpt":
        return max(forwards, SORTING_BYTES * shape.hidden * widest)
    # the Hessians of a block's four different inputs in float32, with the two factors of one of them, and a matrix
    hessians = 4 * (3 * shape.hidden**2 + 3 * widest**2)
    return hessians + max(forwards, SORTING_BYTES * shape.hidden * min(widest, 128) + 8 * shape.hidden * widest)


def _placed(
    device: float, whole: int, beside: float, model: Record, machine: Machine, processes: int = 1, at_once: int = 1
) -> Peak:
    """Return the Peak of a job that takes `device` bytes where the model computes.

    Args:
        device: bytes on the device, weights included.
        whole: bytes of all weights.
        beside: bytes that the host of a GPU holds after the weights have moved to the GPU.
        model: its loading options.
        machine: where the job runs.
        processes: number of processes.
        at_once: how many of them load the model at the same time.
    """
    if not machine.gpus:
        return Peak(int(PROCESS + device), 0)
    # bitsandbytes and device_map put weights on the device as they are read
    loading = 0 if model["quantize"] or model["device_map"] else (1 + READ_AND_SAVED) * whole
    return Peak(int(processes * CUDA_PROCESS + max(at_once * loading, beside)), int(CUDA_CONTEXT + device))
