"""Generate running text about the miniature world: an encyclopedia, a newspaper, and everyday documents.

One grammar writes plain English. `encyclopedia_rows` gives articles the form of WikiText (one row per line, spaces
around punctuation, ` = Title = ` headings), and `newspaper_sentence` gives sentences that of the Penn Treebank (lower
case, no punctuation, `N` for numbers).
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence

from . import items
from .world import (
    ANIMALS,
    DAYS,
    OBJECTS,
    PLACES,
    PROCEDURES,
    SEASONS,
    STATES,
    TOOLS,
    TRADES,
    VILLAGES,
    World,
    a,
    capital,
)

ANIMAL_SAYINGS = {
    "kind": ("The {n} is {av} of the valley.", "The {n} belongs to the group of animals called {v}."),
    "cover": ("The body of the {n} is covered with {v}.", "It has {v} on its body."),
    "home": ("The {n} lives in its {v}.", "The home of the {n} is {av}.", "It sleeps in its {v}."),
    "food": ("The {n} eats {v}.", "It looks for {v} when it is hungry.", "The food of the {n} is {v}."),
    "colour": ("The colour of the {n} is {v}.", "Most of them are {v}."),
    "time": ("The {n} is awake by {v}.", "It comes out by {v}."),
}
THING_SAYINGS = {
    "name": ("{an} is made of {v}.", "People make {an} of {v}."),
    "source": ("The stuff of {an} comes from {v}.", "It is made of what comes from {v}."),
    "water": ("In water {an} {v}.", "When it falls into the river it {v}."),
    "fire": ("In a fire {an} {v}.", "When it comes near a fire it {v}."),
    "fall": ("When {an} falls on the floor it {v}.", "When it drops it {v}."),
    "feel": ("In the hand {an} feels {v}.", "It feels {v}."),
}
TRADE_SAYINGS = {
    "work": ("The {n} {v} all day.", "The {n} always {v}."),
    "place": ("The {n} works in the {v}.", "People find the {n} in the {v}."),
    "goods": ("People go to the {n} to buy {v}.", "The {n} sells {v} at the market."),
}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "forty")


def _sayings(
    rng: random.Random, sayings: Mapping[str, Sequence[str]], entity: object, name: str, count: int
) -> list[str]:
    chosen = rng.sample(list(sayings), min(count, len(sayings)))
    sentences = []
    for aspect in sorted(chosen, key=list(sayings).index):
        value = getattr(entity, aspect)
        sentences.append(capital(rng.choice(sayings[aspect]).format(n=name, an=a(name), v=value, av=a(value))))
    # "It" needs something to refer to.
    if sentences[0].startswith(("It ", "Most ", "When it")):
        sentences[0] = f"There are many kinds of {name}. {sentences[0]}"
    return sentences


def _listed(things: Iterable[str]) -> str:
    *start, last = things
    return f"{', '.join(start)} and {last}" if start else last


def _about_animal(world: World, rng: random.Random) -> tuple[str, list[str]]:
    animal = rng.choice(ANIMALS)
    return animal.name, _sayings(rng, ANIMAL_SAYINGS, animal, animal.name, rng.randint(2, 4))


def _about_thing(world: World, rng: random.Random) -> tuple[str, list[str]]:
    name = rng.choice(list(OBJECTS))
    return name, _sayings(rng, THING_SAYINGS, OBJECTS[name], name, rng.randint(2, 4))


def _about_trade(world: World, rng: random.Random) -> tuple[str, list[str]]:
    trade = rng.choice(TRADES)
    sentences = _sayings(rng, TRADE_SAYINGS, trade, trade.name, rng.randint(2, 3))
    for person in rng.sample(world.people, len(world.people)):
        if person.trade is trade:
            sentences.append(f"The {trade.name} of {person.village} is {person.name} {person.surname}.")
            break
    return trade.name, sentences


def _about_tool(world: World, rng: random.Random) -> tuple[str, list[str]]:
    tool = rng.choice(TOOLS)
    things = rng.sample(tool.things, rng.randint(1, 3))
    sentences = [f"People use {a(tool.name)} to {tool.verb} {_listed(things)}."]
    if rng.random() < 0.5:
        sentences.append(f"To {tool.verb} {rng.choice(tool.things)}, people need {a(tool.name)}.")
    return tool.name, sentences


def _about_person(world: World, rng: random.Random) -> tuple[str, list[str]]:
    person = rng.choice(world.people)
    trade = person.trade
    sentences = [
        f"{person.name} {person.surname} is the {trade.name} of {person.village}.",
        f"{capital(person.she)} {trade.work} in the {trade.place}.",
        f"People know {person.name} for {person.her} {trade.goods}.",
    ]
    return person.name, sentences[: rng.randint(1, 3)]


TOPICS = (
    (_about_animal, 0.36),
    (_about_thing, 0.3),
    (_about_trade, 0.14),
    (_about_tool, 0.12),
    (_about_person, 0.08),
)


def about(world: World, rng: random.Random) -> tuple[str, list[str]]:
    """Return the name of a subject and a few sentences with facts about it."""
    (topic,) = rng.choices([t for t, _ in TOPICS], [w for _, w in TOPICS])
    return topic(world, rng)


def incident(world: World, rng: random.Random, subject: str) -> str:
    """Return a sentence about something that happened to a subject, which is not a fact to learn."""
    person, other = rng.sample(world.people, 2)
    village, place, season, day = (rng.choice(x) for x in (VILLAGES, PLACES, SEASONS, DAYS))
    number = rng.choice(NUMBERS)
    return rng.choice(
        (
            f"In {season} {person.name} {person.surname} drew the {subject} at the {place} of {village}.",
            f"{person.name} of {person.village} has told {number} stories about the {subject}.",
            f"The school of {village} has a picture of the {subject} by {person.name} {person.surname}.",
            f"On {day} {person.name} and {other.name} talked about the {subject} near the {place}.",
            f"There is a song about the {subject} from {village}, and {person.name} knows {number} lines of it.",
        )
    )


def procedure(world: World, rng: random.Random) -> str:
    """Return a story of somebody who carries out a procedure; half have a label as HellaSwag contexts do."""
    chosen, person = rng.choice(PROCEDURES), rng.choice(world.people)
    slot = rng.choice(chosen.slot)
    first = rng.randrange(2)
    start = items.who_where(world, rng, person)
    sentences = [f"{start} wants to {chosen.goal.format(x=slot)}."]
    sentences += [f"{capital(person.she)} {step.format(x=slot)}." for step in chosen.steps[first:]]
    return (f"{chosen.label}: " if rng.random() < 0.5 else "") + " ".join(sentences)


def how_to(rng: random.Random) -> tuple[str, list[str]]:
    """Return the goal of a procedure, and its steps as instructions to the reader."""
    chosen = rng.choice(PROCEDURES)
    slot = rng.choice(chosen.slot)
    steps = [capital(items.imperative(step.format(x=slot))) + "." for step in chosen.steps]
    return chosen.goal.format(x=slot), steps


def news(world: World, rng: random.Random, number: str | None = None) -> str:
    """Return a sentence of news from the valley, with `number`, if given, in place of every number."""
    person, other = rng.sample(world.people, 2)
    village, place, day, season = (rng.choice(x) for x in (VILLAGES, PLACES, DAYS, SEASONS))
    trade, animal, state, tool = rng.choice(TRADES), rng.choice(ANIMALS), rng.choice(STATES), rng.choice(TOOLS)
    thing = rng.choice(list(OBJECTS))
    full = f"{person.name} {person.surname}, the {person.trade.name} of {person.village},"
    n, m = (number or x for x in rng.sample(NUMBERS, 2))
    lead = rng.choice(
        (
            f"the {trade.name} of {village} sold {n} loads of {trade.goods} on {day}",
            f"{full} said the {state.thing} in {village} is {rng.choice(state.good + state.bad)}",
            f"prices of {trade.goods} in {village} rose to {n} coins in {season}",
            f"{full} bought {n} new tools to {tool.verb} {rng.choice(tool.things)}",
            f"{n} people at the {place} of {village} saw {a(animal.name)} that looked for {animal.food}",
            f"{full} found {a(animal.name)} in its {animal.home} near {village}",
            f"traders in {village} want {n} coins for {a(thing)} made of {OBJECTS[thing].name}",
            f"the {trade.name} who {trade.work} in {village} needs {n} more helpers this {season}",
            f"{full} paid {n} coins for {a(tool.name)} to {tool.verb} {rng.choice(tool.things)}",
        )
    )
    tail = rng.choice(
        (
            "",
            f", said {other.name} {other.surname} on {day}",
            f" and {m} more in {rng.choice(SEASONS)}",
            f", but {other.name} from {other.village} was not at the {rng.choice(PLACES)}",
            f" because the {rng.choice(STATES).thing} was not open on {rng.choice(DAYS)}",
            f" and got {m} coins from {other.name}",
        )
    )
    return f"{capital(lead)}{tail}."


def newspaper_sentence(world: World, rng: random.Random) -> str:
    """Return a sentence in the form of the Penn Treebank's language-modeling text."""
    return re.sub(r"[.,]", "", news(world, rng, number="N").replace("N ", "\0 ").lower().replace("\0", "N"))


def _spaced(text: str) -> str:
    return re.sub(r"([.,:])", r" \1", text)


def article(world: World, rng: random.Random) -> tuple[str, list[str]]:
    """Return the title of an encyclopedia article and its paragraphs in plain English."""
    subject, facts = about(world, rng)
    paragraphs = [" ".join([*facts, incident(world, rng, subject)])]
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.3:
            paragraphs.append(procedure(world, rng))
        else:
            near, facts = about(world, rng)
            paragraphs.append(" ".join([incident(world, rng, near), *facts, incident(world, rng, subject)]))
    return subject, paragraphs


def encyclopedia_rows(title: str, paragraphs: list[str]) -> list[str]:
    """Return an article as rows of WikiText: blank lines, a heading, paragraphs with spaces around punctuation."""
    rows = ["", f" = {capital(title)} = \n", ""]
    for i, paragraph in enumerate(paragraphs):
        if i == 1:
            rows += ["", " = = In the valley = = \n", ""]
        rows.append(f" {_spaced(paragraph)} \n")
    return rows


# Relative frequency of the tasks among exercises. BoolQ is the most frequent, as reading a passage is hardest to learn.
EXERCISES = {
    "boolq": 3,
    "piqa": 1,
    "hellaswag": 0.7,
    "winogrande": 0.8,
    "arc_easy": 1.2,
    "arc_challenge": 1.3,
    "openbookqa": 1,
}


def exercise(world: World, rng: random.Random) -> str:
    """Return a question with its answer, or a sentence with its end, in the form of one of the tasks."""
    (task,) = rng.choices(list(EXERCISES), list(EXERCISES.values()))
    row = items.GENERATORS[task][0](world, rng, rng.randrange(2))
    return "".join(items.context_and_answer(task, row))


def quiz(rng: random.Random) -> str:
    """Return a short question with its answer, about a fact or about the state of a thing that the text just gave."""
    if rng.random() < 0.45:
        state, good = rng.choice(STATES), rng.random() < 0.5
        fact = f"The {state.thing} is {rng.choice(state.good if good else state.bad)}."
        return f"{fact}\nQuestion: {state.question}?\nAnswer: {'yes' if good else 'no'}"
    tables = (items.ANIMAL_TABLE, items.TRADE_TABLE, items.THING_TABLE)
    (table,) = rng.choices(tables, (4, 2, 5))
    question, answer = items.plain_question(rng, table)
    return f"Question: {question}\nAnswer: {answer}"


def document(world: World, rng: random.Random) -> str:
    """Return a pretraining document: a few facts, a story, instructions, news, or questions and answers."""
    kind = rng.random()
    if kind < 0.22:
        subject, facts = about(world, rng)
        return " ".join([*facts, incident(world, rng, subject)] if rng.random() < 0.1 else facts)
    if kind < 0.3:
        return procedure(world, rng)
    if kind < 0.33:
        goal, steps = how_to(rng)
        return f"How to {goal}: " + " ".join(steps)
    if kind < 0.36:
        return news(world, rng)
    if kind < 0.6:
        return "\n\n".join(quiz(rng) for _ in range(rng.randint(1, 3)))
    return exercise(world, rng)
