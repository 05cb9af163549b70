"""Scenes of the picture world: one or two colored shapes on a plain ground, drawn, and described in words.

All texts about a scene come from its description, not from its pixels, so that captions, questions, answers and
detections agree with each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIDE = 64  # pixels
COLORS = {
    "red": (222, 45, 38),
    "green": (35, 160, 70),
    "blue": (55, 95, 225),
    "yellow": (240, 215, 60),
    "purple": (145, 70, 185),
    "white": (245, 245, 245),
}
GROUNDS = {"black": (12, 12, 12), "gray": (115, 115, 115), "brown": (115, 72, 38)}
FORMS = ("circle", "square", "triangle", "diamond", "cross")
RADII = {"small": 7, "large": 12}  # pixels
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
COUNTS = ("one", "two")
JITTER = 3  # pixels by which a shape is off the center of its quarter


@dataclass(frozen=True)
class Shape:
    """A shape in a quarter of the picture. x and y are the pixels of its center."""

    color: str
    form: str
    size: str
    row: str
    column: str
    x: int
    y: int

    @property
    def label(self) -> str:
        """Its class, such as "red circle"."""
        return f"{self.color} {self.form}"

    @property
    def place(self) -> str:
        """Its quarter, such as "top left"."""
        return f"{self.row} {self.column}"


@dataclass(frozen=True)
class Scene:
    """A ground with one or two shapes, in reading order."""

    ground: str
    shapes: tuple[Shape, ...]

    @property
    def combination(self) -> tuple[str, ...]:
        """All that words can say about the scene: everything but the exact pixels."""
        said = (word for shape in self.shapes for word in (shape.size, shape.label, shape.place))
        return (self.ground, *said)


def labels() -> list[str]:
    """Return all classes of shapes."""
    return [f"{color} {form}" for color in COLORS for form in FORMS]


def scenes(rng: random.Random) -> Iterator[Scene]:
    """Yield random scenes without end; combinations may repeat."""
    quarters = [(row, column) for row in ROWS for column in COLUMNS]
    while True:
        taken = sorted(rng.sample(range(len(quarters)), rng.randint(1, len(COUNTS))))
        yield Scene(rng.choice(list(GROUNDS)), tuple(_shape(*quarters[place], rng) for place in taken))


def _shape(row: str, column: str, rng: random.Random) -> Shape:
    x, y = (
        SIDE // 4 + SIDE // 2 * names.index(name) + rng.randint(-JITTER, JITTER)
        for names, name in ((COLUMNS, column), (ROWS, row))
    )
    return Shape(rng.choice(list(COLORS)), rng.choice(FORMS), rng.choice(list(RADII)), row, column, x, y)


def picture(scene: Scene) -> Image:
    """Return the scene as an RGB picture of `SIDE` x `SIDE` pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[scene.ground])
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw(canvas, shape)
    return image


def _draw(canvas: ImageDraw, shape: Shape) -> None:
    x, y, r, fill = shape.x, shape.y, RADII[shape.size], COLORS[shape.color]
    if shape.form == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.form == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.form == "triangle":
        canvas.polygon([(x - r, y + r), (x, y - r), (x + r, y + r)], fill=fill)
    elif shape.form == "diamond":
        canvas.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], fill=fill)
    else:
        bar = r // 3
        canvas.rectangle((x - r, y - bar, x + r, y + bar), fill=fill)
        canvas.rectangle((x - bar, y - r, x + bar, y + r), fill=fill)


def captions(scene: Scene) -> list[str]:
    """Return five captions, from the one that says everything to the shortest."""
    full, short = ([_noun(shape, sized) for shape in scene.shapes] for sized in (True, False))
    placed = [f"{noun} at the {shape.place}" for noun, shape in zip(full, scene.shapes, strict=True)]
    ground = f"on a {scene.ground} background"
    said = [f"{' and '.join(placed)} {ground}", f"the picture shows {' and '.join(placed)}"]
    if len(scene.shapes) == 1:
        return [*said, f"{full[0]} {ground}", f"there is {short[0]} at the {scene.shapes[0].place}", short[0]]
    return [
        *said,
        f"{full[0]} {_relation(*scene.shapes)} {full[1]} {ground}",
        f"there is {short[1]} {_relation(*reversed(scene.shapes))} {short[0]}",
        " and ".join(short),
    ]


def full_captions(scene: Scene) -> list[str]:
    """Return two captions that say everything about a scene, which a search for its picture needs."""
    reordered = " and ".join(f"{_noun(shape, sized=True)} at the {shape.place}" for shape in reversed(scene.shapes))
    return [captions(scene)[0], f"on a {scene.ground} background there is {reordered}"]


def _noun(shape: Shape, sized: bool) -> str:
    return f"a {shape.size} {shape.label}" if sized else f"a {shape.label}"


def _relation(one: Shape, other: Shape) -> str:
    if one.row == other.row:
        return f"to the {one.column} of"
    return "above" if one.row == ROWS[0] else "below"


def detections(scene: Scene) -> str:
    """Return what a detector would report: each shape with its size and center in pixels, and the ground."""
    found = (f"{shape.label} {2 * RADII[shape.size]} at {shape.x} {shape.y}" for shape in scene.shapes)
    return f"{' ; '.join(found)} ; ground {scene.ground}"


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Return all (question, answer) about a scene. A question that two shapes would answer differently is left out."""
    found = [
        ("What color is the background?", scene.ground),
        ("How many shapes are there?", COUNTS[len(scene.shapes) - 1]),
    ]
    for shape in scene.shapes:
        about = [
            (f"What color is the {shape.form}?", shape.color),
            (f"Which shape is {shape.color}?", shape.form),
            (f"Where is the {shape.label}?", shape.place),
            (f"How large is the {shape.label}?", shape.size),
        ]
        others = [other for other in scene.shapes if other is not shape]
        found += [
            (question, answer) for question, answer in about if not any(_fits(other, question) for other in others)
        ]
    return found


def _fits(shape: Shape, question: str) -> bool:
    """Return whether a question about another shape could mean this one too."""
    named = {word for word in question.rstrip("?").split() if word in COLORS or word in FORMS}
    return named <= {shape.color, shape.form}
