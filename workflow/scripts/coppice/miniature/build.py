"""Generate the datasets of the miniature world and keep held-out text out of the training text."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from . import corpus, instructions, items
from .leakage import HeldOut, words_of
from .world import World

TASK_ROWS = {"report": 300, "selection": 150, "train": 400}
ARTICLES = {"report": 140, "selection": 80, "train": 700}
SENTENCES = {"report": 1100, "selection": 600, "train": 6000}
INSTRUCTIONS = 6000
DOCUMENTS = 20000
HELD_OUT = ("report", "selection")

_ROLES = ("train", "selection", "report")
DATASETS: dict[str, tuple[str, ...]] = {
    "wikitext2": _ROLES,
    "ptb": _ROLES,
    "alpaca": ("train",),
    **{task: _ROLES for task in items.TASKS},
    "pretraining": ("train",),
}


def build_world(folder: Path, seed: int) -> dict[str, dict[str, int]]:
    """Write `{folder}/{dataset}/{role}.jsonl` for every entry of `DATASETS`.

    The same seed gives the same bytes. No `train` text contains a held-out item (its context with the right answer) or
    a held-out paragraph or sentence, and no item, paragraph or sentence occurs in two roles.

    Returns:
        The number of rows by dataset and role.
    """
    made = _make(World(seed), random.Random(f"valley {seed}"))
    for dataset, roles in DATASETS.items():
        (Path(folder) / dataset).mkdir(parents=True, exist_ok=True)
        for role in roles:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made[dataset][role])
            (Path(folder) / dataset / f"{role}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {dataset: {role: len(made[dataset][role]) for role in roles} for dataset, roles in DATASETS.items()}


def _make(world: World, rng: random.Random) -> dict[str, dict[str, list[Any]]]:
    """Return all rows by dataset and role. Draws held-out text first, then training text that contains none of it."""
    sources = {
        "wikitext2": _articles(world, rng),
        "ptb": _distinct(lambda: corpus.newspaper_sentence(world, rng), words_of),
        **{task: items.make_rows(task, world, rng) for task in items.TASKS},
    }
    sizes = {"wikitext2": ARTICLES, "ptb": SENTENCES}
    drawn = {
        name: {role: list(islice(source, sizes.get(name, TASK_ROWS)[role])) for role in HELD_OUT}
        for name, source in sources.items()
    }
    held_out = HeldOut(text for name, parts in drawn.items() for role in HELD_OUT for text in _texts(name, parts[role]))

    for name, source in sources.items():
        clean = (x for x in source if not any(held_out.inside(text) for text in _texts(name, [x])))
        drawn[name]["train"] = list(islice(clean, sizes.get(name, TASK_ROWS)["train"]))
    follow = _distinct(lambda: instructions.instruction(world, rng), lambda row: words_of(instructions.as_text(row)))
    clean = (row for row in follow if not held_out.inside(instructions.as_text(row)))
    drawn["alpaca"] = {"train": list(islice(clean, INSTRUCTIONS))}
    documents = (corpus.document(world, rng) for _ in count())
    clean = ({"text": text} for text in documents if not held_out.inside(text))
    drawn["pretraining"] = {"train": list(islice(clean, DOCUMENTS))}

    for role in _ROLES:
        rows = (
            row for title, paragraphs in drawn["wikitext2"][role] for row in corpus.encyclopedia_rows(title, paragraphs)
        )
        drawn["wikitext2"][role] = [{"text": row} for row in rows]
        drawn["ptb"][role] = [{"sentence": sentence} for sentence in drawn["ptb"][role]]
    return drawn


def _texts(name: str, drawn: Iterable[Any]) -> Iterator[str]:
    """Yield the texts that must not occur elsewhere: paragraphs, sentences, items with their right answers."""
    for one in drawn:
        if name == "wikitext2":
            yield from one[1]
        elif name == "ptb":
            yield one
        else:
            yield "".join(items.context_and_answer(name, one))


def _distinct(make: Callable[[], Any], key: Callable[[Any], tuple[str, ...]]) -> Iterator[Any]:
    """Yield results of `make` without end, skipping those whose key occurred before."""
    seen = set()
    while True:
        made = make()
        if (k := key(made)) not in seen:
            seen.add(k)
            yield made


def _articles(world: World, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield articles without end, skipping those that share a paragraph with an earlier one."""
    seen: set[tuple[str, ...]] = set()
    while True:
        title, paragraphs = corpus.article(world, rng)
        keys = {words_of(paragraph) for paragraph in paragraphs}
        if seen.isdisjoint(keys):
            seen |= keys
            yield title, paragraphs
