"""Find out whether a model gives the same numbers in a prefix tree as for each text alone.

A model that ignores the mask or the positions raises no error, it only gives other numbers. So a small tree and its
texts run through the model and are compared: the rows are longer than any window of the model, the texts of different
lengths, and their tokens ordinary ones. The comparison is in float32 if the weights allow it, because in half precision
rounding hides a small fault and may look like a large one. If they do not (quantized or distributed weights), the
tolerance follows from how far rounding moves the states of a plain pass.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from .. import library_compat
from . import trie as tries
from .architectures import Knowledge

if TYPE_CHECKING:
    from torch import nn

    from .forward import TreeForward

logger = logging.getLogger("coppice.prefix_tree")

LONGEST = 4096  # limits of the model up to this many tokens are probed; beyond it a probe would take minutes
ORDINARY = 64  # different tokens in a probe
STEM, BRANCH, OTHER, BEYOND = 12, 10, 24, 24  # tokens of the shared prefix, of a branch, of another text, past a limit
TAIL = 8  # tokens at the end of each text that are compared
SHORTEST = 96  # tokens of the longest text, if there is no limit
UNLISTED = 512  # the same, for architectures that are decided by the probe alone

# Differences of a state, relative to its size. In float32 rounding makes about 1e-6, and a branch that sees another
# more than 1e-2. A deep model may amplify rounding by much more. Only a listed architecture may then still pass,
# because tests have proved it exact already.
FLOAT32_TOLERANCE, UNLISTED_MOST = 2e-4, 2e-3
HALF_TOLERANCE, MOST = 3e-2, 2e-1
# What architectures raise that cannot take a 4D mask, these positions or texts of this length.
ERRORS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, AssertionError)

ROUNDING_FACTOR = 2  # times what a nudge of the embeddings moves


@dataclass(frozen=True)
class Verdict:
    """Whether a model may run a prefix tree, and how it must run texts without one.

    Attributes:
        obstacle: why the prefix tree is not exact; "" if it is.
        alone: True if texts of different lengths in one batch change each other's numbers, so that each text must have
            a pass of its own.
        longest_row: the longest row of a prefix tree for which the probe's result holds; None if there is no limit.
    """

    obstacle: str
    alone: bool
    longest_row: int | None = None


def judge(forward: TreeForward, known: Knowledge) -> Verdict:
    """Return the verdict on the model of `forward`, which must be in eval mode."""
    probe = _Probe(forward, known)
    obstacle = known.obstacle or forward.masks.obstacle or probe.unproved
    with torch.no_grad(), torch.autocast(forward.device.type, enabled=False), _in_float32(forward.model) as float32:
        obstacle = obstacle or probe.obstacle(float32)
        if known.listed and not obstacle:  # tests prove that what else is in the pass does not matter to it
            return Verdict("", alone=False)
        # what layers of an unknown kind compute may depend on the length of a batch in ways that no probe has met
        unknown = bool(probe.unproved or forward.masks.unknown)
        alone = known.mixes_lengths or unknown or not probe.padding_is_exact(float32)
    if alone and not obstacle:  # the rows of a tree are padded too
        obstacle = "texts of different lengths in one batch change each other's numbers"
    # only the tree keeps texts on the two sides of a boundary apart
    alone = alone or bool(obstacle and known.boundary)
    return Verdict(obstacle, alone, longest_row=None if known.listed else probe.row_length)


class _Probe:
    """The texts of a probe, and the comparisons that are made with them.

    Attributes:
        unproved: why no probe can prove that the tree is exact; "" if one can.
        row_length: the length of the row that holds all texts.
    """

    def __init__(self, forward: TreeForward, known: Knowledge) -> None:
        self.forward, self.known = forward, known
        context = known.context
        # A listed architecture counts positions, so what its texts cannot reach does not matter. Another one may count
        # places in the row, which are more than the positions.
        limits = [window for window in forward.masks.windows.values() if window] if known.listed else known.limits
        limits = [*limits, *([known.boundary] if known.boundary else [])]
        beyond = [limit for limit in limits if limit > LONGEST and (context is None or limit < context)]
        reachable = [
            limit for limit in limits if limit <= LONGEST and not (known.listed and context and limit >= context)
        ]
        self.unproved = ""
        if beyond and not known.listed:
            self.unproved = (
                f"its architecture is not one that is known to be exact, and a limit of {min(beyond)} tokens in its "
                f"configuration is too long to probe"
            )
        longest = max([SHORTEST if known.listed else UNLISTED, *(limit + BEYOND for limit in reachable)])
        # the tables of some models have two positions less than their configuration says
        self.length = min(longest, max(4, context - 2) if context else longest)
        self.tokens = ordinary_tokens(forward.model)
        self.random = random.Random(0)
        places = min(context or longest, LONGEST, forward.longest_row)
        row = self.length if known.listed else max(longest, places + BEYOND)
        self.texts = self._texts(row)
        self.row_length = len(tries.build(self.texts)[0])

    def _texts(self, row: int) -> list[list[int]]:
        """Return texts that form a tree of more than `row` nodes.

        The first text is as long as the others allow, its branch comes first in the row, and those behind it are short.
        """
        low, *middle, high = self.tokens
        stem = self._some(min(STEM, self.length // 3))
        texts = [[*stem, low, *self._some(self.length - len(stem) - 1)]]
        while sum(map(len, texts)) < row + len(stem) * len(texts):
            texts.append([*stem, middle[len(texts) % len(middle)], *self._some(self.length - len(stem) - 1)])
        texts.append([*stem, high, *self._some(min(BRANCH, self.length - len(stem) - 1))])
        texts.append([high, *self._some(min(OTHER, self.length - 2))])
        return texts

    def _some(self, count: int) -> list[int]:
        return self.random.choices(self.tokens[1:-1], k=count)

    def obstacle(self, float32: bool) -> str:
        """Return what the comparison found against the prefix tree; "" if the tree is exact."""
        try:
            plain = [self.forward.alone(text) for text in self.texts]
            first = self.forward.states(self.texts)
            # only the first branch changes, so the states of the others must stay the same
            changed = [self.texts[0][: len(self.texts[0]) // 2] + self._some(math.ceil(len(self.texts[0]) / 2))]
            second = self.forward.states([*changed, *self.texts[1:]])
            rounding = self._rounding([self.texts[0], self.texts[-1]], [plain[0], plain[-1]], float32)
        except ERRORS as error:
            logger.info("the model does not accept the attention mask of a prefix tree: %r", error)
            return f"it does not accept the attention mask of a prefix tree ({type(error).__name__})"
        if not all(bool(states.isfinite().all()) for states in plain):
            return ""  # a broken model, which gives no valid numbers in any way
        usual = FLOAT32_TOLERANCE if float32 else HALF_TOLERANCE
        most = MOST if self.known.listed else max(usual, UNLISTED_MOST)
        tolerance = min(max(usual, ROUNDING_FACTOR * rounding), most)
        leak = self._largest(second[1:], first[1:])
        error = self._largest(first, plain)
        # the numbers go to the log alone, so that the reason is the same for all models and a report gives it once
        logger.info(
            "prefix tree: error %.1e, leak %.1e, rounding %.1e, tolerance %.1e", error, leak, rounding, tolerance
        )
        if not leak <= tolerance:
            return "in a prefix tree, one branch changes the states of another"
        if not error <= tolerance:
            return "a prefix tree gives other states than each text alone"
        return ""

    def padding_is_exact(self, float32: bool) -> bool:
        """Return whether texts of different lengths, padded on the right in one batch, get their own states."""
        # texts on the two sides of a boundary never share a pass
        texts = [self.texts[-2 if self.known.boundary else 0], self.texts[-1]]
        longest = max(map(len, texts))
        padded = [text + [text[-1]] * (longest - len(text)) for text in texts]
        rows = torch.tensor(padded, device=self.forward.device)
        try:
            plain = [self.forward.alone(text) for text in texts]
            found = [row[: len(text)] for row, text in zip(self.forward.run(rows), texts, strict=True)]
            rounding = self._rounding(texts, plain, float32)
        except ERRORS as error:
            logger.info("the model does not accept the texts of the probe: %r", error)
            return False
        return self._largest(found, plain) <= min(max(FLOAT32_TOLERANCE, ROUNDING_FACTOR * rounding), MOST)

    def _rounding(self, texts: list[list[int]], plain: list[torch.Tensor], float32: bool) -> float:
        """Return how far rounding moves the states `plain` of texts.

        The embeddings are changed by about one unit of their last digit, which shows how much the model amplifies that.
        """
        generator = torch.Generator().manual_seed(0)
        unit = torch.finfo(torch.float32 if float32 else torch.bfloat16).eps

        def nudge(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output)
            return output * (1 + unit * noise)

        hook = self.forward.model.get_input_embeddings().register_forward_hook(nudge)
        try:
            moved = [self.forward.alone(text) for text in texts]
        finally:
            hook.remove()
        return self._largest(moved, plain)

    def _largest(self, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
        """Return the largest difference between the states of texts, [T, width] each, relative to those expected.

        A fault shows in all of the last tokens of a text, which see the most, and rounding may move single ones far.
        So the median of the last ones counts for a listed architecture. For another one, every token counts.
        """
        each = [_differences(one, other) for one, other in zip(found, expected, strict=True)]
        if not all(bool(one.isfinite().all()) for one in each):
            return math.inf
        return max(float(one[-TAIL:].median() if self.known.listed else one.max()) for one in each)


def ordinary_tokens(model: nn.Module) -> list[int]:
    """Return ids whose embeddings are about as long as most others, ascending.

    The lowest ids are often control tokens with embeddings of another size, whose states rounding moves far more than
    those of words, and the highest are often never used.
    """
    weight = model.get_input_embeddings().weight
    special = set(_special(library_compat.text_config(model).to_dict()))
    rows = numpy.unique(numpy.linspace(0, weight.shape[0] - 1, 4096).astype(int))
    rows = [int(row) for row in rows if row not in special] or [int(row) for row in rows]
    if weight.is_meta:  # offloaded: take what is in the middle of the vocabulary
        return rows[len(rows) // 3 :][:ORDINARY]
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # sharded over several processes
    sizes = whole.detach()[rows].float().norm(dim=-1)
    near = (sizes - sizes.median()).abs().argsort()[: max(4, ORDINARY)]
    return sorted(rows[index] for index in near.tolist())


def _special(settings: dict[str, object]) -> Iterator[int]:
    for name, value in settings.items():
        if name.endswith(("token_id", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[bool]:
    """Let each module of a model compute in float32, with a copy of its own weights that lives as long as its call.

    Yields True if all weights are float32 then. Nothing changes if a weight is quantized, sharded or offloaded.
    """
    parameters = list(model.parameters())
    if not all(type(p) is torch.nn.Parameter and p.is_floating_point() and not p.is_meta for p in parameters):
        yield False
        return
    before: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, inputs: object) -> None:
        for p in module.parameters(recurse=False):
            if p.element_size() < 4:
                before[p] = p.data
                p.data = p.data.float()

    def restore(module: nn.Module, inputs: object, output: object) -> None:
        for p in module.parameters(recurse=False):
            if p in before:
                p.data = before.pop(p)

    own = [module for module in model.modules() if any(p.element_size() < 4 for p in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(widen) for module in own]
    hooks += [module.register_forward_hook(restore) for module in own]
    try:
        yield True
    finally:
        for hook in hooks:
            hook.remove()
        for p, data in before.items():  # of modules that raised an error
            p.data = data


def _differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the difference of each state [T, width], relative to the expected state: [T]."""
    return (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
