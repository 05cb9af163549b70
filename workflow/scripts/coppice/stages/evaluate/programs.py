"""Run the programs that a model wrote, and estimate pass@k from how many pass their tests (Chen et al. 2021)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from coppice.core import logs
from coppice.core.aliases import Record
from coppice.core.errors import SettingsError
from coppice.study.settings.sections.evaluate import Programs

from . import sandbox

if TYPE_CHECKING:
    from .parts import Computed

logger = logging.getLogger("coppice.evaluation")

ROWS = "program"  # the kind of rows that have tests
PROTOCOL = 1  # increase it if a change of method makes verdicts obsolete
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)  # code in a chat's answer


def facts_of(settings: Programs) -> Record:
    """Return what decides verdicts, for records."""
    return {"timeout": settings.timeout, "memory": settings.memory, "protocol": PROTOCOL}


def run(samples: Sequence[Record], contents: Sequence[Record], settings: Programs) -> Computed:
    """Run every answer with its row's tests; return ({sandbox}, [{verdicts}] in the order of the samples).

    Args:
        samples: of `row_answers.measure`, with `answers`.
        contents: the columns of the rows: prompt, test and, if `test` defines check(candidate), entry_point.
        settings: the limits.

    Raises:
        SettingsError: not even an empty program runs under these limits here.
    """
    import torch

    lacks = sandbox.unprotected()
    logger.warning(
        "running programs that the model wrote, each in a process with limits, an empty folder and no environment. %s",
        f"They can {'; and '.join(lacks)}."
        if lacks
        else "They can reach neither your files nor the network. "
        "A program written to attack may still break out: use a virtual machine for models that you do not trust.",
    )
    limits = sandbox.Limits(settings.timeout, settings.memory)
    if (said := sandbox.run("", limits)) != sandbox.PASSED:
        raise SettingsError(
            f"evaluate.answers.programs: an empty program does not pass on this machine ({said}), so no program would. "
            "Raise memory and timeout, or set run to false."
        )
    every = [
        program(content, answer) for row, content in zip(samples, contents, strict=True) for answer in row["answers"]
    ]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as workers:
        said = workers.map(lambda text: sandbox.run(text, limits), every)
        verdicts = iter(list(logs.progress(said, "programs", len(every), "program")))
    found = [{"verdicts": [next(verdicts) for _ in row["answers"]]} for row in samples]
    return {"sandbox": {"landlock": sandbox.has_landlock(), "namespaces": sandbox.has_namespaces()}}, found


def program(content: Record, answer: str) -> str:
    """Return an answer as a program with the tests of its row.

    An answer continues the prompt. One that defines the function itself, as those of chat models do, replaces the part
    of the prompt that begins the function; only the code of an answer with fenced code counts.
    """
    name = content.get("entry_point")
    fenced = FENCED.search(answer)
    code = fenced[1] if fenced else answer
    begins = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE) if name else None
    before = content["prompt"]
    if begins and begins.search(code):
        start = begins.search(before)
        before = before[: start.start()] if start else ""
    check = f"check({name})\n" if name else ""
    return f"{before}{code}\n{content['test']}\n{check}"


def scored(verdicts: Sequence[Sequence[str]], ks: Sequence[int]) -> tuple[Record, list[float]]:
    """Return ({value, n, samples, pass_at}, the pass@1 of each row).

    Args:
        verdicts: of each row's programs.
        ks: pass@k is estimated for each k.
    """
    counts = [(len(row), sum(one == sandbox.PASSED for one in row)) for row in verdicts]
    means = {k: math.fsum(pass_at(k, *count) for count in counts) / len(counts) for k in ks}
    rows = [pass_at(1, *count) for count in counts]
    facts = {"n": len(rows), "samples": counts[0][0], "pass_at": {str(k): value for k, value in means.items()}}
    return {"value": math.fsum(rows) / len(rows)} | facts, rows


def pass_at(k: int, total: int, correct: int) -> float:
    """Return the unbiased estimate of the probability that one of k programs is right, from `total` of them."""
    return 1 - math.comb(total - correct, k) / math.comb(total, k)
