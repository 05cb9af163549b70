"""Compare one LoRA optimizer step of this package's engine with padded micro-batches and with TRL.

All three train the same model on the same rows. The padded micro-batches are LLM-Pruner's training: `transformers.
Trainer` with `DataCollatorForSeq2Seq` and micro-batches of four. TRL's `SFTTrainer` packs the rows. Each uses its own
Trainer; they take turns in every repeat. The learning rate is zero, so that each step starts from the same weights. The
clock runs during `Trainer.training_step`, that is, the forward and backward passes of all micro-batches; the update of
the adapter by the optimizer is not counted. On one thread, time is the process's CPU time. Models are random, in the
shapes of Llama (32k vocabulary) and Qwen2 (128k vocabulary).

The floor is the time that the unavoidable matrix products would take at the speed of the model's own products: 4 x the
body's parameters for each distinct token in its context, plus 4 x width x vocabulary for each target token. How much
less this is than the work of padded micro-batches depends on the rows: long answers leave little to save, and then the
bars cannot be met.

    python benchmarks/finetune.py --data FILE --check --json finetune.json

FILE holds real rows (JSON lines with instruction, input, output). Without --data, the rows are those of the miniature
study.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common import MatrixProducts, build_model, conclude, options, seconds
from peak_memory import PeakMemory

from coppice.core import logs

if TYPE_CHECKING:
    import argparse

    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast, Trainer, TrainerControl, TrainerState, TrainingArguments
    from trl import SFTTrainer

    from coppice.core.aliases import Record
    from coppice.models.kinds import Example
    from coppice.stages.recover.engine.trainer import StepTrainer

LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear", "bias": "none", "use_rslora": False, "use_dora": False}
BARS = {"ratio": 1.8, "ratio_large_vocabulary": 2.5, "difference": 1e-5, "trl": 1.0}
LARGE_VOCABULARY = 100_000
MICRO, CUTOFF = 4, 256
NAMES = {"engine": "this engine", "padded": "padded micro-batches", "trl": "TRL, packed"}


def main() -> int:
    """Run the benchmark and return the exit status."""
    arguments = parse_arguments()
    if "trl" not in arguments.skip and importlib.util.find_spec("trl") is None:
        sys.exit("finetune: TRL is not installed; install it with `make bench`, or leave it out with --skip trl")
    logs.limit_threads(arguments.threads)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")
    logging.disable(logging.WARNING)
    rows, tokenizer = prepare_rows(arguments)
    results = {name: measure_model(name, rows, tokenizer, arguments) for name in arguments.models}
    return conclude(results, arguments, below_bars, show, summary)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = options(__doc__, models=["llama-42m", "qwen-88m"])
    parser.add_argument("--batch", type=int, default=64, help="examples per step (default: %(default)s)")
    parser.add_argument(
        "--trl-length", type=int, default=512, help="tokens per packed row of TRL (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="FILE", help="file of real rows")
    parser.add_argument("--skip", nargs="*", choices=("trl",), default=[], help="leave a peer out")
    return parser.parse_args()


def prepare_rows(arguments: argparse.Namespace) -> tuple[list[Example], PreTrainedTokenizerFast]:
    """Return (tokenized examples of one step, tokenizer), the latter a byte-level BPE trained on the rows."""
    from coppice import data, models
    from coppice.miniature.tokenizer import train_tokenizer
    from coppice.models import causal_lm
    from coppice.stages.recover import examples
    from coppice.study.settings.sections.finetune import TrainingData

    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data:
            lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
        else:
            from coppice.miniature.prepare import prepare_world

            prepare_world(Path(scratch) / "world", seed=0)
            rows = data.load(Path(scratch) / "world/alpaca/dataset.json", "train").to_list()
        tokenizer = train_tokenizer([" ".join(map(str, row.values())) for row in rows], 32000, 2048)
        rows = random.Random(0).sample(rows, arguments.batch)
        data.write("alpaca", {"train": rows}, Path(scratch) / "rows")
        settings = TrainingData(val_size=0, cutoff_len=CUTOFF)
        record = Path(scratch) / "rows" / "dataset.json"
        reader = models.Reader(tokenizer)
        return examples.prepare({"alpaca": record}, settings, "alpaca", reader, 0, causal_lm.KIND)[0], tokenizer


def lora_model(name: str) -> PeftModel:
    """Return a random model with an adapter whose weights are not zero, and without dropout.

    A new adapter's B matrices are zero, which would make the gradients of A zero too; dropout would hide differences
    between the engines.
    """
    import torch
    from peft import get_peft_model

    from coppice.models import causal_lm
    from coppice.stages.recover import lora
    from coppice.study.settings.sections.finetune import Lora

    model = build_model(name)
    adapter = Lora(**LORA, dropout=0.0, init="default")
    model = get_peft_model(model, lora.lora_config(model, causal_lm.KIND, adapter))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, 0.0, 0.02)
    return model


def measure_model(
    name: str, rows: Sequence[Example], tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace
) -> Record:
    """Return the results of one model: {vocabulary, dtype, device, tokens, ..., runs: engine -> results}."""
    model = lora_model(name)
    products = MatrixProducts(model.get_base_model())
    with tempfile.TemporaryDirectory() as scratch:
        makers = {"engine": engine_trainer, "padded": padded_trainer, "trl": trl_trainer}
        trainers = {
            key: make(model, rows, tokenizer, Path(scratch) / key, arguments)
            for key, make in makers.items()
            if key not in arguments.skip
        }
        steps, rates = {key: [] for key in trainers}, []
        for _ in range(arguments.repeats):
            for key, trainer in trainers.items():
                steps[key].append(run_step(trainer, arguments.threads))
                if key == "engine":  # the speed of matrix products varies on a shared machine: measure it in between
                    rates.append(products.rate())
                print(f"{name} {key}: {steps[key][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return figures(model, rows, steps, sum(rates) / len(rates))


def arguments_of(output: Path, batch: int, accumulate: int, **more: object) -> Record:
    """Return the training arguments that all three trainers share."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "bf16": cuda,
        "dataloader_pin_memory": False,
        **more,
    }


def engine_trainer(
    model: PeftModel,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    arguments: argparse.Namespace,
) -> StepTrainer:
    """Return this package's trainer."""
    from transformers import PrinterCallback, TrainingArguments

    from coppice.models import causal_lm
    from coppice.stages.recover.engine.progress import StopOnSignal
    from coppice.stages.recover.engine.trainer import StepTrainer
    from coppice.stages.recover.recoveries import recovery_of
    from coppice.stages.recover.training_request import TrainingSettings

    trainer = StepTrainer(
        kind=causal_lm.KIND,
        recovery=recovery_of(TrainingSettings()),
        engine=causal_lm.KIND.engine(model, MICRO * CUTOFF),
        batch_size=arguments.batch,
        model=model,
        args=TrainingArguments(**arguments_of(output, arguments.batch, 1, data_seed=0, remove_unused_columns=False)),
        train_dataset=rows,
        callbacks=[StopOnSignal()],
    )
    trainer.stop = StopOnSignal()
    trainer.remove_callback(PrinterCallback)
    return trainer


def padded_trainer(
    model: PeftModel,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    arguments: argparse.Namespace,
) -> Trainer:
    """Return the transformers Trainer with padded micro-batches."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments_of(output, MICRO, arguments.batch // MICRO)),
        train_dataset=[{key: row[key] for key in ("input_ids", "labels")} for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_trainer(
    model: PeftModel,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    arguments: argparse.Namespace,
) -> SFTTrainer:
    """Return TRL's trainer with packing.

    It packs rows by best-fit decreasing, separates them by their positions (block-diagonal attention), and computes
    the loss on completions only.
    """
    import datasets
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    table = datasets.Dataset.from_list(
        [{"input_ids": r["input_ids"], "completion_mask": [int(label >= 0) for label in r["labels"]]} for r in rows]
    )
    config = partial(SFTConfig, packing=True, max_length=arguments.trl_length, completion_only_loss=True)
    config = partial(config, gradient_checkpointing=False)

    def trainer_with(accumulate: int) -> SFTTrainer:
        settings = arguments_of(output, 1, accumulate)
        return SFTTrainer(model=model, args=config(**settings), train_dataset=table, processing_class=tokenizer)

    # A first trainer packs the rows; the second accumulates as many packed rows, so all are in one optimizer step.
    packed = len(trainer_with(1).train_dataset)
    trainer = trainer_with(packed)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_step(trainer: Trainer, threads: int) -> Record:
    """Run one optimizer step; return {seconds, gradient, peak_bytes}."""
    import torch
    from transformers import TrainerCallback

    found = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            model: PeftModel | None = None,
            **kwargs: object,
        ) -> None:
            named = sorted((n.replace("modules_to_save.", ""), p) for n, p in model.named_parameters())
            found["gradient"] = torch.cat([p.grad.flatten().float().cpu() for _, p in named if p.grad is not None])

    watch = Watch()
    trainer.add_callback(watch)
    clock = StepClock(trainer, threads)
    with PeakMemory() as memory:
        trainer.train()
    trainer.remove_callback(watch)
    return {"seconds": clock.seconds, "gradient": found["gradient"], "peak_bytes": memory.peak}


class StepClock:
    """Seconds that a Trainer spends in `training_step`, summed over a step's micro-batches."""

    def __init__(self, trainer: Trainer, threads: int) -> None:
        """Time the `training_step` of `trainer`. threads: CPU threads, which decide the clock (see `seconds`)."""
        self.seconds = 0.0
        step = type(trainer).training_step

        def timed(*positional: object, **named: object) -> torch.Tensor:
            result, spent = seconds(lambda: step(trainer, *positional, **named), threads)
            self.seconds += spent
            return result

        trainer.training_step = timed


def figures(model: PeftModel, rows: Sequence[Example], steps: Mapping[str, Sequence[Record]], rate: float) -> Record:
    """Return the results of one model from the measured steps (engine -> list) and the speed of matrix products."""
    base = model.get_base_model()
    targets = sum(label >= 0 for row in rows for label in row["labels"][1:])
    tokens = sum(len(row["input_ids"]) for row in rows)
    distinct = {tuple(row["input_ids"][: end + 1]) for row in rows for end in range(len(row["input_ids"]) - 1)}
    body = sum(p.numel() for n, p in base.model.layers.named_parameters() if "lora_" not in n)
    head = base.config.hidden_size * base.config.vocab_size
    work = 4 * (len(distinct) * body + targets * head)
    batches = [rows[start : start + MICRO] for start in range(0, len(rows), MICRO)]
    padded = sum(len(batch) * max(len(row["input_ids"]) for row in batch) for batch in batches)
    floor = work / rate
    runs = {}
    reference = steps["padded"][0]["gradient"].double()
    for key, found in steps.items():
        spent = min(step["seconds"] for step in found)
        apart = (found[0]["gradient"].double() - reference).norm() / reference.norm()
        runs[key] = {"seconds": spent, "steps_per_second": 1 / spent, "tokens_per_second": tokens / spent}
        runs[key] |= {
            "peak_bytes": max(step["peak_bytes"] for step in found),
            "difference": float(apart),
            "floor_share": floor / spent,
        }
    facts = {"vocabulary": base.config.vocab_size, "dtype": str(base.dtype), "device": str(base.device)}
    facts |= {"examples": len(rows), "tokens": tokens, "distinct_tokens": len(distinct), "targets": targets}
    facts |= {"padded_tokens": padded, "padded_work_ratio": 4 * padded * (body + head) / work}
    return facts | {"gemm_gflops": rate / 1e9, "floor_seconds": floor, "runs": runs}


def below_bars(name: str, result: Record) -> Iterator[str]:
    """Yield a sentence per missed bar. Differences of gradients have a bar in float32 only."""
    runs = result["runs"]
    ratio = runs["padded"]["seconds"] / runs["engine"]["seconds"]
    bar = BARS["ratio_large_vocabulary" if result["vocabulary"] > LARGE_VOCABULARY else "ratio"]
    if ratio < bar:
        yield f"{name}: {ratio:.2f} times as fast as padded micro-batches; the bar is {bar}"
    if result["dtype"] == "torch.float32" and runs["engine"]["difference"] > BARS["difference"]:
        yield f"{name}: gradients differ by {runs['engine']['difference']:.1e}; the bar is {BARS['difference']:.0e}"
    if "trl" in runs and runs["trl"]["seconds"] < BARS["trl"] * runs["engine"]["seconds"]:
        yield f"{name}: slower than TRL ({runs['engine']['seconds']:.2f} s against {runs['trl']['seconds']:.2f} s)"


def show(name: str, result: Record) -> None:
    """Print the results of one model as a table."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{name}, {result['dtype'].removeprefix('torch.')}: {result['examples']} examples, {result['tokens']} tokens "
        f"({result['distinct_tokens']} distinct in context), {result['targets']} targets, "
        f"{result['gemm_gflops']:.0f} GFLOP/s; padded micro-batches do {result['padded_work_ratio']:.2f} "
        "times the floor's work"
    )
    table = Table(title=title, title_justify="left")
    columns = ("", "s/step", "steps/s", "tokens/s", "peak MB", "gradient difference", "of floor", "ratio")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for key, run in result["runs"].items():
        ratio = result["runs"]["padded"]["seconds"] / run["seconds"]
        speed = (f"{run['seconds']:.2f}", f"{run['steps_per_second']:.3f}", f"{run['tokens_per_second']:.0f}")
        exact = (f"{run['peak_bytes'] / 1e6:.0f}", f"{run['difference']:.1e}", f"{run['floor_share']:.0%}")
        table.add_row(NAMES[key], *speed, *exact, f"{ratio:.2f}")
    Console(width=130).print(table)


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    parts = []
    for name, result in results.items():
        runs = result["runs"]
        ratios = [f"{runs['padded']['seconds'] / runs['engine']['seconds']:.2f}x padded micro-batches"]
        if "trl" in runs:
            ratios.append(f"{runs['trl']['seconds'] / runs['engine']['seconds']:.2f}x TRL")
        parts.append(f"{name} {', '.join(ratios)}")
    return f"finetune: {'; '.join(parts)}; {'FAIL' if failures else 'pass'}"


if __name__ == "__main__":
    sys.exit(main())
