"""Generate the data sets of the picture world: captions, questions, pairs and classes of drawn scenes.

No combination of shapes, places and ground occurs in two roles, so held-out scenes are new to every model.
"""

import hashlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from coppice.core.aliases import Record
from coppice.data.pictures import Facts

from . import scenes
from .scenes import Scene

SCENES = {"report": 300, "selection": 200, "train": 5000}  # held-out scenes are drawn first
QUESTIONS = 2  # of a training scene; held-out rows are about one picture each, so that they are independent
SHORT_SHARE = 0.4  # of the training pairs of a single shape have its class as their caption, as captions on the web do
PICTURES = "pictures"  # folder of the pictures, which all data sets share


def build_pictures(folder: Path, seed: int) -> dict[str, dict[str, list[Record]]]:
    """Draw the pictures under `{folder}/pictures` and return the rows by data set and role.

    The same seed gives the same bytes. Paths of pictures in the rows are relative to `{folder}/pictures`.
    """
    tables: dict[str, dict[str, list[Record]]] = {name: {} for name in ROWS}
    for role, drawn in _by_role(seed).items():
        (folder / PICTURES / role).mkdir(parents=True, exist_ok=True)
        images = [_drawn(scene, folder / PICTURES, f"{role}/{number:05d}.png") for number, scene in enumerate(drawn)]
        for name, rows_of in ROWS.items():
            rng, held_out = random.Random(f"{name} {role} {seed}"), role != "train"
            tables[name][role] = [
                row for cell, scene in zip(images, drawn, strict=True) for row in rows_of(scene, cell, held_out, rng)
            ]
    return tables


def _drawn(scene: Scene, root: Path, path: str) -> list[Record]:
    """Write the picture of a scene; return the cell of a row that names it."""
    content = io.BytesIO()
    scenes.picture(scene).save(content, format="PNG", compress_level=1)
    (root / path).write_bytes(content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    return [asdict(Facts(path, digest, scenes.SIDE, scenes.SIDE))]


def _by_role(seed: int) -> dict[str, list[Scene]]:
    """Return the scenes by role. Held-out scenes are distinct; training scenes repeat none of them."""
    rng, held_out = random.Random(f"scenes {seed}"), set()
    found = {}
    for role, count in SCENES.items():
        new = (scene for scene in scenes.scenes(rng) if scene.combination not in held_out)
        if role == "train":
            found[role] = list(islice(new, count))
        else:
            found[role] = list(islice(_once(new, held_out), count))
    return found


def _once(drawn: Iterator[Scene], seen: set[tuple[str, ...]]) -> Iterator[Scene]:
    for scene in drawn:
        if scene.combination not in seen:
            seen.add(scene.combination)
            yield scene


def _captions(scene: Scene, held_out: bool) -> list[str]:
    """Return all captions of a held-out scene, and the two longest ones of a training scene."""
    return scenes.captions(scene) if held_out else scenes.captions(scene)[:2]


def _text_rows(scene: Scene, images: list[Record], held_out: bool, rng: random.Random) -> list[Record]:
    return [{"prompt": f"caption: {scenes.detections(scene)}", "captions": _captions(scene, held_out)}]


def _plain_rows(scene: Scene, images: list[Record], held_out: bool, rng: random.Random) -> list[Record]:
    """Return all captions as one text."""
    return [{"text": " ".join(f"{caption.capitalize()}." for caption in scenes.captions(scene))}]


def _caption_rows(scene: Scene, images: list[Record], held_out: bool, rng: random.Random) -> list[Record]:
    return [{"images": images, "captions": _captions(scene, held_out)}]


def _question_rows(scene: Scene, images: list[Record], held_out: bool, rng: random.Random) -> list[Record]:
    chosen = rng.sample(scenes.questions(scene), 1 if held_out else QUESTIONS)
    return [{"images": images, "question": question, "answer": answer} for question, answer in chosen]


def _pair_rows(scene: Scene, images: list[Record], held_out: bool, rng: random.Random) -> list[Record]:
    full = scenes.full_captions(scene)
    if held_out:
        return [{"images": images, "captions": full}]
    short = len(scene.shapes) == 1 and rng.random() < SHORT_SHARE
    return [{"images": images, "captions": [scenes.captions(scene)[-1] if short else rng.choice(full)]}]


def _class_rows(scene: Scene, images: list[Record], held_out: bool, rng: random.Random) -> list[Record]:
    """Return the class of a single shape; a picture of two shapes has no single class."""
    return [{"images": images, "label": shape.label} for shape in scene.shapes if len(scene.shapes) == 1]


ROWS: dict[str, Callable[[Scene, list[Record], bool, random.Random], list[Record]]] = {
    "captions": _text_rows,
    "picture-texts": _plain_rows,
    "picture-captions": _caption_rows,
    "picture-questions": _question_rows,
    "picture-pairs": _pair_rows,
    "picture-classes": _class_rows,
}
