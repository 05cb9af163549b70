"""Collect the facts about a training for its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.core import records
from coppice.core.aliases import Record

from . import progress

if TYPE_CHECKING:
    from .trainer import StepTrainer


def facts_of(trainer: StepTrainer) -> Record:
    """Return the facts about a training so far: its length, speed, losses, arrangement and warnings.

    `validation_loss` is that of the best checkpoint. If a metric decides which that is, `best_by` holds its values.
    """
    state, seconds, best_by = trainer.state, trainer.log_file.seconds, trainer.best_by
    found = best_by.found(state.log_history)
    metric = {"metric": best_by.key, "first": found.first, "best": found.best}
    return {
        "steps": state.global_step,
        "tokens_seen": state.num_input_tokens_seen,
        "tokens_per_second": state.num_input_tokens_seen / seconds if seconds else None,
        "seconds": seconds,
        "train_loss": progress.mean_loss(state.log_history),
        "validation_loss": found.loss,
        "best_step": found.step,
        "first_validation_loss": found.first_loss,
        **({"best_by": metric} if trainer.asking else {}),
        "arrangement": trainer.engine.arrangement,
        "tokens_at_a_time": trainer.engine.token_limit,
        "processes": trainer.args.world_size,
        "sharded": trainer.sharded,
        "peak_memory_bytes": records.peak_memory(),
        "warnings": [
            *trainer.engine.warnings,
            *progress.warnings_of(found, state.global_step, best_by),
            *progress.warnings_of_rate(
                trainer.args.warmup_steps, state.global_step, trainer.args.lr_scheduler_type.value
            ),
        ],
    }
