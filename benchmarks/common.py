"""What the benchmarks share: random models in real shapes, clocks, matrix-product speed, and runs of Snakemake."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from coppice.core.aliases import PathLike, Record

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
    "llama-12x512": ("llama", SMALL | {"vocab_size": 32000, "num_hidden_layers": 12}),
    "llama-24x1024": (
        "llama",
        SMALL
        | {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816}
        | {"num_hidden_layers": 24, "num_attention_heads": 16},
    ),
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


Result = TypeVar("Result")


def build_model(name: str) -> PreTrainedModel:
    """Return a random model in the shape `name` of `SHAPES`, on the device and in the precision that a study uses."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from coppice import models

    architecture, shape = SHAPES[name]
    config = AutoConfig.for_model(architecture, **shape)
    torch.manual_seed(0)
    with models.device():
        return AutoModelForCausalLM.from_config(config, dtype=models.dtype_of(None)).eval()


def on_gpu() -> bool:
    """Return whether models will be placed on a GPU, without importing torch."""
    from coppice import models

    return models.device_kind() == "cuda"


def seconds(function: Callable[[], Result], threads: int = 1) -> tuple[Result, float]:
    """Return (result, seconds) of a call to `function`.

    On one CPU thread the seconds are CPU time, so other work on the machine counts little. With several threads or a
    GPU they are wall time, because CPU time adds up over threads and leaves out the GPU.
    """
    import torch

    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda or threads > 1 else time.process_time
    if cuda:
        torch.cuda.synchronize()  # kernels run asynchronously: earlier ones must end before the clock starts
    start = clock()
    result = function()
    if cuda:
        torch.cuda.synchronize()
    return result, clock() - start


class MatrixProducts:
    """The speed of a model's own matrix products: each weight once, on 512 tokens (8192 on a GPU)."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Collect the weights of `model`, and make random states for each of their widths."""
        import torch

        self.rows = 8192 if model.device.type == "cuda" else 512
        head = model.get_output_embeddings().weight
        # peft keeps an adapter's weights in float32; a half-precision model never multiplies them on their own.
        named = model.model.layers.named_parameters()
        self.weights = [p for name, p in named if p.dim() == 2 and "lora_" not in name]
        self.weights += [head[start : start + 4096] for start in range(0, len(head), 4096)]
        widths = {w.shape[1] for w in self.weights}
        self.states = {n: torch.randn(self.rows, n, dtype=head.dtype, device=head.device) for n in widths}

    def rate(self) -> float:
        """Measure and return the operations per second."""
        import torch

        def multiply() -> None:
            for weight in self.weights:
                torch.nn.functional.linear(self.states[weight.shape[1]], weight)

        with torch.inference_mode():
            _, spent = seconds(multiply)
        return 2 * self.rows * sum(w.numel() for w in self.weights) / spent


def checkout(folder: PathLike) -> None:
    """Make `folder` a checkout of this workflow without its configuration, using symbolic links."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for part in ("workflow", "Snakefile", "profiles"):
        (folder / part).symlink_to(ROOT / part)


def environment() -> dict[str, str]:
    """Return this process's environment with the folder of this Python, and so its snakemake, first on the PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def snakemake(folder: PathLike, *words: str) -> subprocess.CompletedProcess[str]:
    """Run snakemake in `folder` and return the finished process with its output in `stdout`."""
    return subprocess.run(
        ["snakemake", *words], cwd=folder, env=environment(), check=True, capture_output=True, text=True
    )


def options(description: str, models: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options that the model benchmarks share; `models` are the default shapes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a result misses its bar")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    # The first runs on a GPU load kernels and allocate memory; a long evaluation or training does that only once.
    parser.add_argument(
        "--repeats",
        type=int,
        default=3 if on_gpu() else 1,
        help="runs of each; the fastest counts (default: 3 on a GPU, else 1)",
    )
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=models, help=f"model shapes (default: {' '.join(models)})"
    )
    return parser


def quietly(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command without showing its output; if it fails, exit with the end of that output."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout[-3000:]}")


def conclude(
    results: Mapping[str, Record],
    arguments: argparse.Namespace,
    below_bars: Callable[[str, Record], Iterable[str]],
    show: Callable[[str, Record], None],
    summary: Callable[[Mapping[str, Record], Sequence[str]], str],
) -> int:
    """Print the results, the missed bars and a summary line, write the results as JSON, and return the exit status.

    Args:
        results: name -> result.
        arguments: parsed options, of which `json` and `check` are used.
        below_bars: function (name, result) -> sentences about missed bars.
        show: function (name, result) that prints one result.
        summary: function (results, failures) -> the last line.
    """
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failures = [failure for name, result in results.items() for failure in below_bars(name, result)]
    for name, result in results.items():
        show(name, result)
    for failure in failures:
        print(f"bar missed: {failure}")
    print(summary(results, failures))
    return 1 if arguments.check and failures else 0
