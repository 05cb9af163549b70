"""Work out the length of a training that has a budget of steps, tokens or operations, before it begins."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

from coppice.core.errors import SettingsError
from coppice.study.settings.resolved import Budget

from ..training_request import TrainingSettings
from .loader import StepSampler

VALIDATIONS = 10  # at least so many validations per training


def steps(budget: Budget, lengths: list[int], batch_size: int, per_token: float, seed: int) -> int:
    """Return the number of optimizer steps until `budget` is spent, including the step that reaches it.

    Args:
        budget: what the training may take.
        lengths: the number of tokens of each training example.
        batch_size: examples per step.
        per_token: the operations of training on one token.
        seed: decides the order of the examples, and with it the tokens of each step.

    Raises:
        SettingsError: The first step alone exceeds the budget.
    """
    if budget.unit == "max_steps":
        return int(budget.amount)
    tokens = budget.amount if budget.unit == "tokens" else budget.amount / per_token
    spent = 0
    for step, cost in enumerate(_tokens(lengths, batch_size, seed), start=1):
        spent += cost
        if step == 1 and cost > tokens:
            raise SettingsError(
                f"budget.{budget.unit}: {budget.amount:g} is smaller than the first step ({cost} tokens, "
                f"{cost * per_token:.3g} operations). Raise the budget, or lower batch_size."
            )
        if spent >= tokens:
            return step


def _tokens(lengths: Sequence[int], size: int, seed: int) -> Iterator[int]:
    """Yield the number of tokens of each step, without end."""
    # the sampler that the training uses: steps differ in length, so only the same order gives the exact count
    sampler = StepSampler(len(lengths), size, seed)
    for epoch in count():
        sampler.set_epoch(epoch)
        for batch in sampler:
            yield sum(lengths[place] for place in batch)


def resolved(settings: TrainingSettings, lengths: list[int], per_token: float, seed: int) -> TrainingSettings:
    """Return the settings with `max_steps` and `eval_steps` worked out from `budget`; without one, unchanged."""
    if not settings.budget:
        return settings
    most = steps(settings.budget, lengths, settings.batch_size, per_token, seed)
    if settings.warmup_steps >= most:
        raise SettingsError(
            f"budget: it is spent after {most} steps, before the learning rate has risen "
            f"(warmup_steps: {settings.warmup_steps}). Raise the budget, or lower warmup_steps."
        )
    # a short training is validated more often than configured: the best checkpoint is chosen among validated ones
    interval = min(settings.eval_steps, max(1, most // VALIDATIONS))
    return settings.model_copy(update={"max_steps": most, "eval_steps": interval})


def rung(settings: TrainingSettings, share: float) -> int:
    """Return the step of a race's rung: the first validation at or after the fraction `share` of the training."""
    interval = settings.eval_steps
    # only at a validated step is there a loss to compare, and the last step is validated in any case
    return min(settings.max_steps, interval * math.ceil(share * settings.max_steps / interval))
