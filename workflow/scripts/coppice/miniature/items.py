"""Generate items of the seven zero-shot tasks with exactly the fields of the official datasets.

Each generator makes one row from a random number generator. `make_rows` yields distinct rows whose right answers are
spread evenly over the places. `context_and_answer` gives the text that lm-eval's official definition scores for the
right answer.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from coppice.core.aliases import Record

from .leakage import words_of
from .world import (
    ANIMALS,
    DAYS,
    OBJECTS,
    PLACES,
    PROCEDURES,
    STATES,
    TOOLS,
    TRADES,
    VILLAGES,
    Person,
    World,
    a,
    capital,
)

LETTERS = ("A", "B", "C", "D")
# Attribute -> (form of its value as a short answer, questions that ask for it).
ANIMAL_ASPECTS = {
    "kind": ("{a}", ("What kind of animal is {the}?", "To which group of animals does {the} belong?")),
    "cover": ("{v}", ("What covers the body of {the}?", "What does {the} wear on its body?")),
    "home": ("in its {v}", ("Where does {the} live?", "Where does {the} sleep?")),
    "food": ("{v}", ("What does {the} eat?", "What is the food of {the}?")),
    "colour": ("{v}", ("What is the colour of {the}?", "Which colour does {the} have?")),
}
TRADE_ASPECTS = {
    "work": ("{v}", ("What is the daily work of {the}? The {n}", "What does {the} do all day? The {n}")),
    "place": ("in the {v}", ("Where does {the} work?", "Where can people find {the}?")),
    "goods": ("{v}", ("What can people get from {the}?", "What does {the} sell at the market?")),
}
THING_ASPECTS = {
    "source": (
        "from {v}",
        ("Where does the stuff of {the} come from?", "From what do people get the stuff for {the}?"),
    ),
    "water": ("It {v}.", ("What happens to {the} in the river?", "What happens when {the} lies in water?")),
    "fire": ("It {v}.", ("What happens to {the} in a fire?", "What happens when {the} gets very hot?")),
    "fall": ("It {v}.", ("What happens when {the} falls on the floor?", "What happens to {the} when it drops?")),
    "feel": ("{v}", ("How does {the} feel in the hand?", "How does it feel to touch {the}?")),
}


def values(entities: Iterable[object], aspect: str) -> list[str]:
    """Return the distinct values of an aspect in the order of the tables."""
    return list(dict.fromkeys(getattr(entity, aspect) for entity in entities))


def scene(world: World, rng: random.Random, noun: str) -> str:
    """Return a sentence that sets a question somewhere in the valley, so that one question gives many items."""
    person = rng.choice(world.people)
    if rng.random() < 0.5:
        return f"{person.name} saw {a(noun)} near the {rng.choice(PLACES)} of {rng.choice(VILLAGES)}."
    return f"On {rng.choice(DAYS)} {person.name} saw {a(noun)} in {rng.choice(VILLAGES)}."


def who_where(world: World, rng: random.Random, person: Person) -> str:
    """Return the start of a sentence whose subject is the person."""
    return rng.choice(
        (
            f"On {rng.choice(DAYS)} {person.name}",
            f"At the {rng.choice(PLACES)} {person.name}",
            f"{person.name} from {rng.choice(VILLAGES)}",
        )
    )


def four(rng: random.Random, right: str, pool: list[str], place: int) -> list[str]:
    """Return four choices from `pool` with the right one at index `place`."""
    wrong = rng.sample([value for value in pool if value != right], 3)
    return [*wrong[:place], right, *wrong[place:]]


# (name -> facts, aspect -> (form of an answer, questions))
Table = tuple[Mapping[str, object], Mapping[str, tuple[str, Sequence[str]]]]
T = TypeVar("T")


def phrase(form: str, value: str) -> str:
    """Return the value as a short answer."""
    return form.format(v=value, a=a(value))


def plain_question(rng: random.Random, table: Table) -> tuple[str, str]:
    """Return a question without a scene, and its answer. `table` is (name -> facts, aspects)."""
    facts, aspects = table
    name, aspect = rng.choice(list(facts)), rng.choice(list(aspects))
    form, questions = aspects[aspect]
    return rng.choice(questions).format(the=a(name), n=name), phrase(form, getattr(facts[name], aspect))


def question_about(world: World, rng: random.Random, place: int, table: Table) -> tuple[str, list[str]]:
    """Return a question with its scene, and four choices. `table` is (name -> facts, aspects)."""
    facts, aspects = table
    name, aspect = rng.choice(list(facts)), rng.choice(list(aspects))
    form, questions = aspects[aspect]
    pool = [phrase(form, value) for value in values(facts.values(), aspect)]
    choices = four(rng, phrase(form, getattr(facts[name], aspect)), pool, place)
    return f"{scene(world, rng, name)} {rng.choice(questions).format(the=a(name), n=name)}", choices


ANIMAL_TABLE = ({x.name: x for x in ANIMALS}, ANIMAL_ASPECTS)
TRADE_TABLE = ({x.name: x for x in TRADES}, TRADE_ASPECTS)
THING_TABLE = (OBJECTS, THING_ASPECTS)


def _arc_row(question: str, choices: list[str], place: int) -> Record:
    return {
        "id": "",
        "question": question,
        "choices": {"text": choices, "label": list(LETTERS)},
        "answerKey": LETTERS[place],
    }


def arc_easy(world: World, rng: random.Random, place: int) -> Record:
    """Return a question of one step: a fact about an animal or a trade."""
    table = ANIMAL_TABLE if rng.random() < 0.65 else TRADE_TABLE
    return _arc_row(*question_about(world, rng, place, table), place)


def arc_challenge(world: World, rng: random.Random, place: int) -> Record:
    """Return a question of two steps: from a thing to its material, and from the material to what happens."""
    return _arc_row(*question_about(world, rng, place, THING_TABLE), place)


def openbookqa(world: World, rng: random.Random, place: int) -> Record:
    """Return an unfinished sentence about a tool, a trade or an animal, with four endings."""
    person, village, day = rng.choice(world.people), rng.choice(VILLAGES), rng.choice(DAYS)
    start = rng.choice((f"On {day} in {village}, {person.name}", f"{person.name} from {village}"))
    kind = rng.randrange(4)
    if kind == 0:
        tool = rng.choice(TOOLS)
        stem = f"{start} {rng.choice(('wants', 'has'))} to {tool.verb} {rng.choice(tool.things)} and needs"
        right, pool = a(tool.name), [a(t.name) for t in TOOLS]
    elif kind == 1:
        trade = rng.choice(TRADES)
        stem = f"{start} {rng.choice(('wants to buy', 'asks for'))} {trade.goods} and goes to the"
        right, pool = trade.name, [t.name for t in TRADES]
    elif kind == 2:
        animal = rng.choice(ANIMALS)
        stem = f"{start} {rng.choice(('follows', 'watches'))} {a(animal.name)} until it comes to its"
        right, pool = animal.home, values(ANIMALS, "home")
    else:
        animal = rng.choice(ANIMALS)
        stem = f"{start} {rng.choice(('feeds', 'keeps'))} {a(animal.name)} and every day brings it some"
        right, pool = animal.food, values(ANIMALS, "food")
    choices = {"text": four(rng, right, pool, place), "label": list(LETTERS)}
    return {"id": "", "question_stem": stem, "choices": choices, "answerKey": LETTERS[place]}


def piqa(world: World, rng: random.Random, place: int) -> Record:
    """Return a goal and two ways to reach it that differ in one thing."""
    person, spot = rng.choice(world.people), rng.choice(PLACES)
    where = rng.choice((f"at the {spot}", f"for {person.name}", f"for {person.name} at the {spot}"))
    kind = rng.randrange(3)
    if kind == 0:
        tool, other = rng.sample(TOOLS, 2)
        goal = f"{tool.verb} {rng.choice(tool.things)} {where}"
        form = rng.choice(("Take {} and start the work.", "Look for {} and use it."))
        right, wrong = form.format(a(tool.name)), form.format(a(other.name))
    elif kind == 1:
        trade, other = rng.sample(TRADES, 2)
        goal = f"get {trade.goods} {where}"
        form = rng.choice(("Go to the {} and ask for the {}.", "Walk to the {} and talk to the {}."))
        right, wrong = form.format(trade.place, trade.name), form.format(other.place, other.name)
    else:
        procedure = rng.choice(PROCEDURES)
        slot, (early, late) = rng.choice(procedure.slot), sorted(rng.sample(range(len(procedure.steps)), 2))
        first, last = (imperative(procedure.steps[i].format(x=slot)) for i in (early, late))
        goal = f"{procedure.goal.format(x=slot)} {where}"
        right, wrong = f"{capital(first)}, then {last}.", f"{capital(last)}, then {first}."
    pair = (right, wrong) if place == 0 else (wrong, right)
    return {"goal": goal, "sol1": pair[0], "sol2": pair[1], "label": place}


def imperative(step: str) -> str:
    """Turn a step of a procedure into a command: `washes and cuts the leek` -> `wash and cut the leek`."""
    words = step.split()
    for i, word in enumerate(words):
        if i == 0 or words[i - 1] == "and":
            words[i] = re.sub(r"(?<=sh|ss|go)es$|(?<=x)es$|s$", "", word)
    return " ".join(words)


def hellaswag(world: World, rng: random.Random, place: int) -> Record:
    """Return the start of a procedure with four next steps.

    The wrong ones are a step out of order, a step with another slot and a step of another procedure.
    """
    procedure, other = rng.sample(PROCEDURES, 2)
    person = rng.choice(world.people)
    slot, wrong_slot = rng.sample(procedure.slot, 2)
    done = rng.choice([i for i in range(1, len(procedure.steps)) if "{x}" in procedure.steps[i]])
    start = who_where(world, rng, person)
    steps = [step.format(x=slot) for step in procedure.steps]
    context = f"{start} wants to {procedure.goal.format(x=slot)}."
    context += "".join(f" {capital(person.she)} {step}." for step in steps[max(0, done - 2) : done])
    off = rng.choice([i for i in range(len(steps)) if i not in (done, done - 1)])
    wrong = [
        steps[off],
        procedure.steps[done].format(x=wrong_slot),
        rng.choice(other.steps).format(x=rng.choice(other.slot)),
    ]
    rng.shuffle(wrong)
    endings = [f"{text}." for text in [*wrong[:place], steps[done], *wrong[place:]]]
    return {
        "ind": 0,
        "activity_label": procedure.label,
        "ctx_a": context,
        "ctx_b": person.she,
        "ctx": f"{context} {person.she}",
        "endings": endings,
        "source_id": "",
        "split": "",
        "split_type": "indomain",
        "label": str(place),
    }


def winogrande(world: World, rng: random.Random, place: int) -> Record:
    """Return a sentence in which two of a kind meet and the rest fits only one of them."""
    person, spot, village = rng.choice(world.people), rng.choice(PLACES), rng.choice(VILLAGES)
    kind = rng.randrange(3)
    if kind == 0:
        aspect = rng.choice(("home", "food", "cover"))
        one, two = _unlike(rng, ANIMALS, aspect)
        end = {
            "home": "because the _ wanted to go home to its {}.",
            "food": "because the _ was hungry and looked for {}.",
            "cover": "and {1} liked the _ because of its {0}.",
        }[aspect]
        meeting = rng.choice(("met near the {p} of {v}", "were both seen by {n} at the {p}", "passed the {p} of {v}"))
    elif kind == 1:
        aspect = rng.choice(("work", "place"))
        one, two = _unlike(rng, TRADES, aspect)
        end = {"work": "because the _ always {}.", "place": "and then the _ went back to the {}."}[aspect]
        meeting = rng.choice(("met near the {p} of {v}", "talked with {n} at the {p}", "passed the {p} of {v}"))
    else:
        aspect = rng.choice(("water", "fire", "fall"))
        one, two = _unlike(rng, tuple(OBJECTS), aspect, OBJECTS)
        meeting = rng.choice(("are carried by {n} to the {p}", "lie near the {p} of {v}"))
        end = {
            "water": "and when both fall into the river the _ {}.",
            "fire": "and when both fall into the fire the _ {}.",
            "fall": "and when both fall on the floor the _ {}.",
        }[aspect]
    fact = getattr(OBJECTS[one] if kind == 2 else one, aspect)
    names = [one, two] if kind == 2 else [one.name, two.name]
    options = names if place == 0 else names[::-1]
    mentioned = options if rng.random() < 0.5 else options[::-1]
    meeting = meeting.format(p=spot, v=village, n=person.name)
    sentence = f"The {mentioned[0]} and the {mentioned[1]} {meeting}, {end.format(fact, person.she)}"
    return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(place + 1)}


def _unlike(rng: random.Random, entities: Sequence[T], aspect: str, facts: Mapping[T, object] | None = None) -> list[T]:
    """Return two entities that differ in the aspect."""
    while True:
        pair = rng.sample(entities, 2)
        if len({getattr(facts[x] if facts else x, aspect) for x in pair}) == 2:
            return pair


def boolq(world: World, rng: random.Random, place: int) -> Record:
    """Return a passage about one or two things, and a question that the state of one of them answers."""
    person, village, day = rng.choice(world.people), rng.choice(VILLAGES), rng.choice(DAYS)
    state, other = rng.sample(STATES, 2)
    clauses = [f"the {state.thing} is {rng.choice(state.good if place else state.bad)}"]
    if rng.random() < 0.4:
        clauses.append(f"the {other.thing} is {rng.choice(other.good + other.bad)}")
        rng.shuffle(clauses)
    said = " and ".join(clauses)
    news = rng.choice(
        (
            f"On {day} {person.name} came back from {village}. {capital(person.she)} said that {said}.",
            f"People in {village} say that {said}. {person.name} heard it on {day}.",
            f"{person.name} wrote a letter to {village} on {day}. It says that {said}.",
        )
    )
    return {"question": state.question, "passage": f"{village} -- {news}", "idx": 0, "label": place}


GENERATORS: dict[str, tuple[Callable[[World, random.Random, int], Record], int]] = {
    "boolq": (boolq, 2),
    "piqa": (piqa, 2),
    "hellaswag": (hellaswag, 4),
    "winogrande": (winogrande, 2),
    "arc_easy": (arc_easy, 4),
    "arc_challenge": (arc_challenge, 4),
    "openbookqa": (openbookqa, 4),
}
TASKS = tuple(GENERATORS)


def context_and_answer(task: str, row: Record) -> tuple[str, str]:
    """Return the context and the right continuation as lm-eval 0.4.13 scores them."""
    if task == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", " " + ("no", "yes")[row["label"]]
    if task == "piqa":
        return f"Question: {row['goal']}\nAnswer:", " " + (row["sol1"], row["sol2"])[row["label"]]
    if task == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return context, " " + row["endings"][int(row["label"])]
    if task == "winogrande":
        before, after = row["sentence"].split("_")
        return before + row[f"option{row['answer']}"], " " + after.strip()
    answer = " " + row["choices"]["text"][LETTERS.index(row["answerKey"])]
    if task == "openbookqa":
        return row["question_stem"], answer
    return f"Question: {row['question']}\nAnswer:", answer


def make_rows(task: str, world: World, rng: random.Random) -> Iterator[Record]:
    """Yield distinct rows of a task without end, with the right answer at each place in turn."""
    generate, choices = GENERATORS[task]
    seen, made = set(), 0
    while True:
        row = generate(world, rng, made % choices)
        key = words_of("".join(context_and_answer(task, row)))
        if key not in seen:
            seen.add(key)
            yield number(row, made)
            made += 1


def number(row: Record, index: int) -> Record:
    """Return the row with the identifier fields of its schema filled in."""
    names = {"id": f"valley-{index}", "ind": index, "idx": index, "source_id": f"valley~{index}"}
    return {key: names.get(key, value) for key, value in row.items()}
