"""How long a training lasts where it may spend so many steps, tokens or operations: known before it begins."""

import math
from itertools import count

from coppice.core.errors import SettingsError

from .loader import StepSampler

# Operations a parameter and token: two forwards, two for the gradient of what a layer gets, two for that of its weight
OPERATIONS = {"lora": 4, "all": 6}
VALIDATIONS = 10  # a training, at least


def steps(budget, train, settings, parameters, seed):
    """Optimizer steps until `budget` ({unit: max_steps | tokens | flops, amount}) is spent, the last one counted in.

    train: the examples; parameters: of the whole model. Operations are counted as `OPERATIONS` a parameter and token.
    Raises SettingsError where the first step is more than the budget.
    """
    if budget["unit"] == "max_steps":
        return budget["amount"]
    operations = OPERATIONS[settings.get("train", "lora")] * parameters
    tokens = budget["amount"] if budget["unit"] == "tokens" else budget["amount"] / operations
    spent = 0
    for step, cost in enumerate(_tokens(train, settings["batch_size"], seed), start=1):
        spent += cost
        if step == 1 and cost > tokens:
            raise SettingsError(
                f"budget.{budget['unit']}: {budget['amount']:g} is spent before the first step is over, which takes "
                f"{cost} tokens ({cost * operations:.3g} operations); raise it, or lower batch_size"
            )
        if spent >= tokens:
            return step


def _tokens(train, size, seed):
    """Tokens of each step, in the order of `loader`."""
    lengths = [len(example["input_ids"]) for example in train]
    sampler = StepSampler(len(train), size, seed)
    for epoch in count():
        sampler.set_epoch(epoch)
        for batch in sampler:
            yield sum(lengths[place] for place in batch)


def settled(settings, train, parameters, seed):
    """The settings with `max_steps` and `eval_steps` worked out where they have a `budget`; else as they are."""
    if not settings.get("budget"):
        return settings
    most = steps(settings["budget"], train, settings, parameters, seed)
    if settings["warmup_steps"] >= most:
        raise SettingsError(
            f"the budget is spent after {most} steps, but the learning rate rises for {settings['warmup_steps']} "
            "(warmup_steps): raise the budget, or lower those"
        )
    return settings | {"max_steps": most, "eval_steps": min(settings["eval_steps"], max(1, most // VALIDATIONS))}


def rung(settings, share):
    """The step at which so large a share of a training is done: the next one at which its validation loss is taken."""
    each = settings["eval_steps"]
    return min(settings["max_steps"], each * math.ceil(share * settings["max_steps"] / each))
