"""The facts of the miniature world: a small river valley with its animals, things, tools, trades and people.

These tables hold everything that a tiny model can learn; `corpus`, `items` and `instructions` only put it into words.
The facts are fixed, except who lives where and has which trade, which depends on the seed (`World`).
"""

import random
from dataclasses import dataclass

PLACES = ("mill", "bridge", "market", "well", "harbour", "inn", "church", "orchard", "school", "barn")
VILLAGES = ("Ashby", "Elmford", "Stonely", "Redmoor", "Willowby", "Harrow", "Oakham", "Fernhill")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SEASONS = ("spring", "summer", "autumn", "winter")
SURNAMES = ("Holt", "Marsh", "Reed", "Stone", "Webb", "Lane", "Frost", "Hill")


@dataclass(frozen=True)
class Animal:
    """An animal: its kind, what covers it, its home and food, its color, and when it is awake."""

    name: str
    kind: str
    cover: str
    home: str
    food: str
    colour: str
    time: str


@dataclass(frozen=True)
class Material:
    """What a thing is made of. `water`, `fire` and `fall` say what happens to it there."""

    name: str
    source: str
    water: str
    fire: str
    fall: str
    feel: str


@dataclass(frozen=True)
class Tool:
    """A tool: what it does, and the things that it does it to."""

    name: str
    verb: str
    things: tuple[str, ...]


@dataclass(frozen=True)
class Trade:
    """A trade: its work, the place of its work, and the goods that it sells."""

    name: str
    work: str
    place: str
    goods: str


@dataclass(frozen=True)
class Procedure:
    """Steps in order, each in the third person without its subject. `{x}` is the slot that the steps share."""

    label: str
    goal: str
    slot: tuple[str, ...]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """A thing with two states, and a question whose answer is yes in the good state and no in the bad one."""

    thing: str
    good: tuple[str, ...]
    bad: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Person:
    """A person: names, pronouns (`she` or `he`, `her` or `his`), trade and village."""

    name: str
    surname: str
    she: str
    her: str
    trade: Trade
    village: str


ANIMALS = tuple(
    Animal(*row.split(", "))
    for row in (
        "fox, mammal, fur, den, rabbits, red, night",
        "owl, bird, feathers, hollow tree, mice, brown, night",
        "otter, mammal, fur, river bank, fish, brown, day",
        "heron, bird, feathers, reed bed, frogs, grey, day",
        "badger, mammal, fur, burrow, worms, grey, night",
        "bat, mammal, fur, cave, moths, black, night",
        "trout, fish, scales, river, flies, silver, day",
        "frog, amphibian, wet skin, pond, flies, green, night",
        "snake, reptile, scales, stone heap, mice, green, day",
        "lizard, reptile, scales, old wall, beetles, green, day",
        "bee, insect, short hair, hive, nectar, yellow, day",
        "ant, insect, hard plates, ant hill, seeds, black, day",
        "squirrel, mammal, fur, pine tree, nuts, red, day",
        "swan, bird, feathers, lake, water plants, white, day",
        "crow, bird, feathers, tall tree, seeds, black, day",
        "goat, mammal, short hair, stable, hay, white, day",
        "duck, bird, feathers, pond, snails, brown, day",
        "hen, bird, feathers, coop, grain, white, day",
    )
)

MATERIALS = {
    m.name: m
    for m in (
        Material("wood", "trees", "floats", "burns", "stays whole", "rough"),
        Material("iron", "ore", "sinks", "glows red", "stays whole", "cold"),
        Material("glass", "sand", "sinks", "cracks", "breaks", "smooth"),
        Material("wool", "sheep", "soaks up water", "burns", "lands softly", "soft"),
        Material("clay", "mud", "sinks", "grows hard", "breaks", "dry"),
        Material("wax", "bees", "floats", "melts", "bends", "slippery"),
        Material("leather", "cows", "soaks up water", "shrinks", "bends", "tough"),
        Material("paper", "rags", "falls apart", "burns", "lands softly", "thin"),
        Material("stone", "rock", "sinks", "only gets warm", "cracks", "heavy"),
        Material("straw", "wheat", "floats", "burns", "lands softly", "light"),
    )
}

OBJECTS = {
    thing: MATERIALS[material]
    for material, things in (
        ("wood", "table, ladder, barrel"),
        ("iron", "nail, kettle, anvil"),
        ("glass", "window, bottle, mirror"),
        ("wool", "blanket, scarf, sock"),
        ("clay", "jug, brick, bowl"),
        ("wax", "candle, seal"),
        ("leather", "boot, saddle, belt"),
        ("paper", "map, letter, book"),
        ("stone", "millstone, statue"),
        ("straw", "hat, basket"),
    )
    for thing in things.split(", ")
}

TOOLS = tuple(
    Tool(name, verb, tuple(things.split(", ")))
    for name, verb, things in (
        ("knife", "cut", "bread, cheese, ham, cake"),
        ("needle", "sew", "shirts, sails, buttons, curtains"),
        ("spoon", "stir", "soup, tea, porridge, jam"),
        ("axe", "split", "logs, old planks, roots"),
        ("brush", "paint", "fences, doors, walls, boats"),
        ("rake", "gather", "leaves, hay, cut grass"),
        ("bucket", "carry", "water, milk, sand"),
        ("net", "catch", "fish, crabs, butterflies"),
        ("spade", "dig", "holes, trenches, garden beds"),
        ("rope", "tie up", "boats, goats, sacks"),
        ("scale", "weigh", "flour, apples, butter, nails"),
        ("lantern", "light up", "cellars, caves, dark roads"),
    )
)

TRADES = tuple(
    Trade(*row.split(", "))
    for row in (
        "baker, bakes bread, bakery, bread",
        "smith, shapes iron, forge, horseshoes",
        "fisher, catches trout, boat house, fish",
        "potter, shapes clay, pottery, jugs",
        "weaver, weaves cloth, weaving room, cloth",
        "shepherd, looks after sheep, hill farm, wool",
        "gardener, grows roses, garden, flowers",
        "healer, cares for the sick, sick house, medicine",
        "teacher, teaches children, classroom, lessons",
        "carpenter, builds tables, workshop, furniture",
        "ferryman, rows people over the river, ferry, boat rides",
        "cook, prepares dinner, kitchen, hot meals",
    )
)

PROCEDURES = (
    Procedure(
        "Making tea",
        "make {x} tea",
        ("mint", "sage", "nettle", "rose", "apple"),
        (
            "boils a kettle of water",
            "puts the {x} leaves in a warm pot",
            "pours the hot water over the {x} leaves",
            "waits until the {x} tea is strong",
            "drinks the {x} tea from a cup",
        ),
    ),
    Procedure(
        "Baking a cake",
        "bake a {x} cake",
        ("honey", "plum", "nut", "cherry", "carrot"),
        (
            "mixes flour, eggs and butter in a bowl",
            "adds the {x} to the flour and stirs",
            "puts the {x} cake into the hot oven",
            "takes the {x} cake out when it is brown",
            "cuts the {x} cake and gives everyone a piece",
        ),
    ),
    Procedure(
        "Planting",
        "plant {x} seeds",
        ("bean", "pumpkin", "poppy", "turnip", "clover"),
        (
            "digs a row of holes with a spade",
            "drops a {x} seed into every hole",
            "covers the {x} seeds with soil",
            "waters the {x} bed every evening",
            "picks the {x} crop in the autumn",
        ),
    ),
    Procedure(
        "Painting",
        "paint the {x}",
        ("fence", "door", "boat", "cart", "gate"),
        (
            "scrapes the old paint off the {x}",
            "washes the {x} and lets it dry",
            "opens the can and dips in the brush",
            "paints the {x} from top to bottom",
            "hangs up a sign that the {x} is wet",
        ),
    ),
    Procedure(
        "Fishing",
        "catch a {x}",
        ("trout", "pike", "perch", "carp", "eel"),
        (
            "ties a hook to the line",
            "puts a worm on the hook for the {x}",
            "throws the line where the {x} swims",
            "feels the {x} pull at the line",
            "lifts the {x} into the boat with a net",
        ),
    ),
    Procedure(
        "Knitting",
        "knit a {x}",
        ("scarf", "sock", "mitten", "shawl", "cap"),
        (
            "winds the wool into a ball",
            "casts the first row of the {x} onto the needle",
            "knits the {x} row by row",
            "cuts the wool when the {x} is long enough",
            "puts on the {x} and goes out into the snow",
        ),
    ),
    Procedure(
        "Washing clothes",
        "wash the {x}",
        ("shirt", "apron", "coat", "sheet", "dress"),
        (
            "fills a tub with warm water and soap",
            "rubs the {x} until the dirt is gone",
            "rinses the {x} in the clear river",
            "hangs the {x} on the line in the sun",
            "folds the dry {x} and puts it away",
        ),
    ),
    Procedure(
        "Making a pot",
        "make a clay {x}",
        ("jug", "bowl", "vase", "plate", "lamp"),
        (
            "presses the wet clay until it is soft",
            "turns the wheel and shapes the {x}",
            "lets the {x} dry on a shelf",
            "burns the {x} in the hot kiln",
            "sells the finished {x} at the market",
        ),
    ),
    Procedure(
        "Cooking soup",
        "cook {x} soup",
        ("onion", "leek", "pea", "potato", "cabbage"),
        (
            "washes and cuts the {x} on a board",
            "browns the {x} in a little butter",
            "pours water over the {x} and adds salt",
            "stirs the {x} soup for an hour",
            "serves the {x} soup with fresh bread",
        ),
    ),
    Procedure(
        "Sending mail",
        "send a {x}",
        ("letter", "parcel", "present", "card", "book"),
        (
            "writes a few words on a sheet of paper",
            "wraps the {x} and ties it with string",
            "writes the name of the village on the {x}",
            "takes the {x} to the post office",
            "pays a coin so that the {x} can go with the cart",
        ),
    ),
)

STATES = tuple(
    State(thing, tuple(good.split("/")), tuple(bad.split("/")), question)
    for thing, good, bad, question in (
        ("bridge", "mended/safe again", "broken/washed away", "can people cross the bridge"),
        ("gate", "open/wide open", "locked/closed", "can a cart pass the gate"),
        ("lamp", "full of oil/burning", "out of oil/smashed", "does the lamp give light"),
        ("boat", "new and dry/mended", "full of holes/broken", "can the boat sail on the river"),
        ("well", "full of water/clean again", "dry/full of sand", "can people drink from the well"),
        ("oven", "hot/burning", "cold/smashed", "can the baker use the oven"),
        ("road", "open/dry and safe", "flooded/closed", "can the cart use the road"),
        ("rope", "new and strong/strong", "rotten/torn", "does the rope hold a boat"),
        ("bell", "mended/new and loud", "cracked/stolen", "can the bell ring"),
        ("mill", "mended/open", "closed/broken", "does the mill grind grain"),
        ("roof", "new and strong/mended", "full of holes/rotten", "does the roof keep out the rain"),
        ("bread", "fresh/new and warm", "rotten/stolen", "can people eat the bread"),
    )
)

_NAMES = (
    ("Mira", "Nora", "Clara", "Ida", "Ruth", "Lena", "Alma", "Greta"),
    ("Tomas", "Oscar", "Peter", "Hugo", "Felix", "Simon", "Karl", "Jonas"),
)


class World:
    """The people that one seed gives, with their names, trades and villages."""

    def __init__(self, seed: int) -> None:
        """Draw the people."""
        rng = random.Random(f"people {seed}")
        trades, surnames = list(TRADES), list(SURNAMES) * 2
        rng.shuffle(trades)
        rng.shuffle(surnames)
        named = [(n, "she", "her") for n in _NAMES[0]] + [(n, "he", "his") for n in _NAMES[1]]
        self.people = tuple(
            Person(name, surnames[i], she, her, trades[i % len(trades)], rng.choice(VILLAGES))
            for i, (name, she, her) in enumerate(named)
        )


def a(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    """Return the text with its first letter in upper case and the rest unchanged."""
    return text[:1].upper() + text[1:]
