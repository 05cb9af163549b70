"""What a model will take, from its configuration alone: parameters, bytes, peak memory, time.

Nothing is imported that takes a second: the workflow asks when it is parsed. The peaks are sums of what is held at the
same time (weights, activations of the tokens at a time, a chunk of logits, the adapter with its optimizer) plus what an
empty process takes; times are operations over a rate that the caller assumes.
"""

from dataclasses import dataclass
from pathlib import Path

from .parsing import parsed

MB = 10**6
PROCESS = 1500 * MB  # Python, torch, transformers and peft, before any model; with CUDA's context on a GPU
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, None: 2}
QUANTIZED = {"4bit": 0.55, "8bit": 1.05}  # bytes a weight, scales counted in
LOGITS = 2 * 256 * MB  # a chunk of logits and its gradient: see `output_layer`
EVALUATED_TOKENS = 16384  # at a time on a GPU, at most
ADAPTER_BYTES = 16  # a trained parameter in float32, its gradient and Adam's two moments


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of Llama's kind."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool
    biases: int  # of attention, a layer
    norms: int  # weights of normalisations a layer

    @property
    def layer(self):
        """Parameters of a layer."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.inner + self.biases + self.norms

    @property
    def parameters(self):
        """All of them, tied ones once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer + self.hidden


def shape_of(path):
    """The Shape in a config.json; None where the file is not there or is of another kind of model."""
    try:
        config = parsed(Path(path).read_text(encoding="utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head = config.get("head_dim") or hidden // heads
        sizes = config["num_hidden_layers"], hidden, config["intermediate_size"], heads, kv_heads, head
        vocabulary, kind = config["vocab_size"], config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    biases = head * (heads + 2 * kv_heads) if kind == "qwen2" else 0
    if config.get("attention_bias"):
        biases = head * (heads + 2 * kv_heads) + hidden
    norms = 2 * hidden + (2 * head if kind == "qwen3" else 0)
    return Shape(*sizes, vocabulary, bool(config.get("tie_word_embeddings")), biases, norms)


def weight_bytes(shape, dtype=None, quantize=None):
    """Bytes of the weights as they are loaded: embeddings and output layer are never quantised."""
    whole = BYTES[dtype]
    if not quantize:
        return shape.parameters * whole
    layers = shape.layers * shape.layer
    return int(layers * QUANTIZED[quantize] + (shape.parameters - layers) * whole)


def adapter_parameters(shape, lora):
    """Trained parameters of LoRA with rank `lora.r` on the modules that its settings name."""
    wide = shape.head * shape.heads
    narrow = shape.head * shape.kv_heads
    widths = {
        "q_proj": shape.hidden + wide,
        "k_proj": shape.hidden + narrow,
        "v_proj": shape.hidden + narrow,
        "o_proj": shape.hidden + wide,
        "gate_proj": shape.hidden + shape.inner,
        "up_proj": shape.hidden + shape.inner,
        "down_proj": shape.hidden + shape.inner,
    }
    groups = {"attention": list(widths)[:4], "mlp": list(widths)[4:], "all-linear": list(widths)}
    wanted = lora["target_modules"]
    names = [part for name in ([wanted] if isinstance(wanted, str) else wanted) for part in groups.get(name, [name])]
    return shape.layers * lora["r"] * sum(widths.get(name, 0) for name in dict.fromkeys(names))


def kept_values(hidden, inner):
    """Values that a decoder layer keeps of a token: about 8 states of the hidden width and 4 of the MLP's."""
    return 8 * hidden + 4 * inner


def activations(shape, tokens, width, layers):
    """Bytes of what `layers` layers keep of `tokens` tokens."""
    return tokens * layers * kept_values(shape.hidden, shape.inner) * width


def peaks(shape, model, finetune, calibration):
    """stage -> peak bytes on the device. model: {dtype, quantize}; finetune, calibration: sections of the study."""
    width = BYTES[model["dtype"]]
    weights = weight_bytes(shape, model["dtype"], model["quantize"])
    tokens = finetune["micro_batch_size"] * finetune["data"]["cutoff_len"]
    kept = 1 if finetune["gradient_checkpointing"] else shape.layers
    trained = adapter_parameters(shape, finetune["lora"])
    states = calibration["samples"] * calibration["length"] * shape.hidden * width
    return {
        "finetune": PROCESS
        + weights
        + ADAPTER_BYTES * trained
        + activations(shape, tokens, width, kept)
        + tokens * shape.layers * shape.hidden * width
        + LOGITS,
        "evaluate": PROCESS + weights + activations(shape, EVALUATED_TOKENS, width, 1) + LOGITS,
        # one block's gradients and what its inputs and outputs were, beside the whole model
        "prune": PROCESS + weights + 4 * shape.layer * width + 2 * states + activations(shape, 4096, width, 1),
    }
