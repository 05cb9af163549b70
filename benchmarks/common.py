"""What the benchmarks share: random models in real shapes, clocks, the speed of a model's own matrix products, and
runs of Snakemake."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
LARGE = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES = {
    "llama-11m": (
        "llama",
        SMALL | {"vocab_size": 16000, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4},
    ),
    "llama-42m": ("llama", SMALL | {"vocab_size": 32000}),
    "qwen-88m": ("qwen2", SMALL | {"vocab_size": 128000, "num_key_value_heads": 2}),
    "mistral-39m": ("mistral", SMALL | {"vocab_size": 32000, "num_key_value_heads": 2, "sliding_window": 64}),
    "llama-240m": (
        "llama",
        LARGE
        | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16}
        | {"tie_word_embeddings": True},
    ),
    "llama-1b": (
        "llama",
        LARGE
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"tie_word_embeddings": True},
    ),
    "llama-8b": (
        "llama",
        LARGE | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
}


def build_model(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from coppice import models

    architecture, shape = SHAPES[name]
    config = AutoConfig.for_model(architecture, **shape)
    torch.manual_seed(0)
    with models.device():
        return AutoModelForCausalLM.from_config(config, dtype=models.dtype_of(None)).eval()


def on_gpu():
    """Whether models will be on a GPU, known without importing torch."""
    from coppice import models

    return models.device_kind() == "cuda"


def seconds(function, threads=1):
    """(result, seconds of `function`): CPU time on one thread, wall time on several or on a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda or threads > 1 else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    result = function()
    if cuda:
        torch.cuda.synchronize()
    return result, clock() - start


class MatrixProducts:
    """How fast a model's own matrix products are by themselves: every weight once, on 512 tokens (8192 on a GPU)."""

    def __init__(self, model):
        import torch

        self.rows = 8192 if model.device.type == "cuda" else 512
        head = model.get_output_embeddings().weight
        # peft keeps an adapter's weights in float32, which products of a half-precision model never take by themselves
        named = model.model.layers.named_parameters()
        self.weights = [p for name, p in named if p.dim() == 2 and "lora_" not in name]
        self.weights += [head[start : start + 4096] for start in range(0, len(head), 4096)]
        widths = {w.shape[1] for w in self.weights}
        self.states = {n: torch.randn(self.rows, n, dtype=head.dtype, device=head.device) for n in widths}

    def rate(self):
        """Operations a second, measured now."""
        import torch

        def multiply():
            for weight in self.weights:
                torch.nn.functional.linear(self.states[weight.shape[1]], weight)

        with torch.inference_mode():
            _, spent = seconds(multiply)
        return 2 * self.rows * sum(w.numel() for w in self.weights) / spent


def checkout(folder):
    """Make `folder` a checkout of this workflow, by links, that lacks its configuration."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for part in ("workflow", "Snakefile", "profiles"):
        (folder / part).symlink_to(ROOT / part)


def environment():
    """This process's environment, in which the snakemake beside this Python is found first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def snakemake(folder, *words):
    """Run snakemake in `folder`; its output is in `stdout`."""
    return subprocess.run(
        ["snakemake", *words], cwd=folder, env=environment(), check=True, capture_output=True, text=True
    )


def options(description, models):
    """A parser of what the benchmarks of models have in common; models: the shapes that are measured by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a figure is below its bar")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    # a GPU's first runs load kernels and take memory, which a long evaluation or training does once
    parser.add_argument(
        "--repeats",
        type=int,
        default=3 if on_gpu() else 1,
        help="runs of each, of which the fastest counts (default: 3 on a GPU, else 1)",
    )
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=models, help=f"shapes (default: {' '.join(models)})"
    )
    return parser


def quietly(command, environment=None):
    """Run a command; where it fails, end with the last lines that it wrote."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def conclude(results, arguments, below_bars, show, summary):
    """Write and print the results by model, what is below its bar, and last a line; returns the exit status."""
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failures = [failure for name, result in results.items() for failure in below_bars(name, result)]
    for name, result in results.items():
        show(name, result)
    for failure in failures:
        print(f"not within the bar: {failure}")
    print(summary(results, failures))
    return 1 if arguments.check and failures else 0
