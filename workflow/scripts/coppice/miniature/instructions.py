"""Generate instructions about the miniature world in Alpaca's schema (instruction, input, output).

About a third ask to continue running text. Training only on instructions with short answers would raise accuracy but
worsen perplexity.
"""

import random

from . import corpus, items
from .world import World, capital


def _row(instruction: str, given: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


def _question(world: World, rng: random.Random) -> dict[str, str]:
    task = rng.choice(("arc_easy", "arc_challenge"))
    context, answer = _exercise(task, world, rng)
    if rng.random() < 0.5:
        return _row("Answer the question in a few words.", context, answer)
    return _row(context.removeprefix("Question: ").removesuffix("\nAnswer:"), "", answer)


def _exercise(task: str, world: World, rng: random.Random) -> tuple[str, str]:
    context, answer = items.context_and_answer(task, items.GENERATORS[task][0](world, rng, rng.randrange(2)))
    return context, answer.strip()


def _reading(world: World, rng: random.Random) -> dict[str, str]:
    context, answer = _exercise("boolq", world, rng)
    return _row("Read the passage and answer the question with yes or no.", context, answer)


def _goal(world: World, rng: random.Random) -> dict[str, str]:
    context, answer = _exercise("piqa", world, rng)
    if rng.random() < 0.5:
        return _row("Say how to reach the goal.", context, answer)
    return _row(f"How can I {context.removeprefix('Question: ').removesuffix(chr(10) + 'Answer:')}?", "", answer)


def _next_step(world: World, rng: random.Random) -> dict[str, str]:
    context, answer = _exercise("hellaswag", world, rng)
    return _row("Tell what happens next.", context, answer)


def _sentence(world: World, rng: random.Random) -> dict[str, str]:
    task = rng.choice(("openbookqa", "winogrande"))
    context, answer = _exercise(task, world, rng)
    return _row("Complete the sentence.", context, answer)


def _how_to(world: World, rng: random.Random) -> dict[str, str]:
    goal, steps = corpus.how_to(rng)
    return _row(f"How do people {goal}?", "", " ".join(steps))


def _describe(world: World, rng: random.Random) -> dict[str, str]:
    subject, facts = corpus.about(world, rng)
    return _row(f"Tell me about the {subject}.", "", " ".join(facts))


def _continue(world: World, rng: random.Random) -> dict[str, str]:
    """Return running text of either corpus, cut after its first few words."""
    if rng.random() < 0.5:
        title, paragraphs = corpus.article(world, rng)
        text = "\n\n".join(row for row in corpus.encyclopedia_rows(title, paragraphs[:1]) if row).strip()
    else:
        text = " ".join(corpus.newspaper_sentence(world, rng) for _ in range(3))
    words = text.split(" ")
    cut = rng.randint(4, 8)
    return _row("Continue the text.", " ".join(words[:cut]), " ".join(words[cut:]))


KINDS = (
    (_question, 0.18),
    (_reading, 0.1),
    (_goal, 0.1),
    (_next_step, 0.1),
    (_sentence, 0.14),
    (_how_to, 0.03),
    (_describe, 0.05),
    (_continue, 0.3),
)


def instruction(world: World, rng: random.Random) -> dict[str, str]:
    """Return one instruction row."""
    (kind,) = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])
    return kind(world, rng)


def as_text(row: dict[str, str]) -> str:
    """Return the row as one text, for comparison with held-out texts."""
    return " ".join((capital(row["instruction"]), row["input"], row["output"]))
