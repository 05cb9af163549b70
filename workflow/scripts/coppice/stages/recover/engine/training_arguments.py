"""Translate the section `finetune` into `transformers.TrainingArguments`."""

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from coppice import models
from coppice.core.errors import SettingsError

from ..training_request import TrainingSettings
from . import processes
from .best_by import BestBy


def training_arguments(
    dtype: torch.dtype, settings: TrainingSettings, output: Path, seed: int, best_by: BestBy | None
) -> TrainingArguments:
    """Return the TrainingArguments of one training.

    Args:
        dtype: the torch dtype of the base weights.
        settings: how to train, with the training length worked out.
        output: the folder of the checkpoints.
        seed: of the data order and of dropout.
        best_by: what decides which checkpoint is the best; None without validation examples.

    Raises:
        SettingsError: A step has fewer examples than there are processes.
    """
    world = processes.count()
    if settings.batch_size < world:
        raise SettingsError(
            f"finetune.batch_size: {settings.batch_size} examples per step are too few for {world} processes. "
            "Raise it, or lower resources_per_job.finetune.gpu."
        )
    device = models.device().type
    return TrainingArguments(
        output_dir=str(output),
        # No gradient accumulation: a batch is a whole optimizer step, which the engine divides into micro-batches.
        per_device_train_batch_size=settings.batch_size // world,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,  # -1 is Trainer's "not set"
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        # Every checkpoint is written at a logged step: a resumed training then logs what an uninterrupted one does.
        logging_steps=math.gcd(10, settings.eval_steps, settings.save_steps),
        # The filter replaces a NaN loss by the mean of the earlier ones, so that it would go unnoticed.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if best_by else "no",
        eval_steps=settings.eval_steps,
        metric_for_best_model=best_by.name if best_by else None,
        greater_is_better=bool(best_by and best_by.higher_is_better),
        save_strategy="steps",
        save_steps=settings.save_steps,
        remove_unused_columns=False,
        # mixed precision only for weights in half precision on a GPU
        bf16=dtype == torch.bfloat16 and device == "cuda",
        fp16=dtype == torch.float16 and device == "cuda",
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and world > 1 else None,  # NCCL needs GPUs
        report_to=settings.report_to or "none",
        disable_tqdm=True,  # TrainingLog writes the progress
        seed=seed,
        data_seed=seed,
    )
