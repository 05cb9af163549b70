"""Make caption data of annotated images: text to text for captioners, or images with their captions.

The captions come from COCO's format, and what a text captioner reads of an image from a template over the objects in
it: COCO's instances, or a detector's results. Any other JSON works by a template of one's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2
import jinja2.sandbox

from coppice.core import logs, records
from coppice.core.aliases import Json, PathLike, Record
from coppice.core.errors import DataError, SettingsError

from . import json_files, splitting

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = (
    "Describe the picture. It shows"
    "{% for one in objects %}{{ ';' if loop.index0 }} {{ one.name }}, {{ one.size }}, {{ one.place }}"
    "{% if one.score is not none %} ({{ '%.2f' % one.score }}){% endif %}{% endfor %}."
)
PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
SIZES = ((0.25, "large"), (0.05, "medium"), (0.0, "small"))  # least share of the picture -> word


@dataclass(frozen=True)
class CaptionData:
    """What to make caption data of.

    Attributes:
        captions: COCO's captions: a JSON file with `images` and `annotations`.
        items: in place of it, a JSON, JSON lines, CSV or Parquet file of rows with `caption` or `captions`, which the
            template reads, and with `image` or `image_id` if several rows may be of one image.
        rows: "text" makes rows {image_id, prompt, captions}, "image" rows {image_id, image, captions}.
        instances: COCO's instances, the objects in each image.
        detections: in place of it, a detector's results in COCO's format: a list of {image_id, bbox, score} with
            category_id (named by `instances` or by `categories` of `captions`) or `category`.
        template: Jinja2 of the prompt, or a file of it. It reads `image` (with `width` and `height`) and `objects`, of
            which each has `name`, `box` (x, y, width, height in pixels), `place`, `size`, `score` and `area`; or the
            columns of an item.
        min_score: detections with a lower score are left out.
        sample_count: the number of images, a sample; None takes all.
    """

    captions: PathLike | None = None
    items: PathLike | None = None
    rows: Literal["text", "image"] = "text"
    instances: PathLike | None = None
    detections: PathLike | None = None
    template: str | None = None
    min_score: float = 0.0
    sample_count: int | None = None

    def __post_init__(self) -> None:
        """Raise SettingsError for a choice that lacks what it needs."""
        if (self.captions is None) == (self.items is None):
            raise SettingsError("captions, items: give one of them, the file that holds the captions")
        if self.rows == "text" and self.items is not None and self.template is None:
            raise SettingsError("template: is needed to make prompts of items, such as 'Describe: {{ tags }}'")
        if self.rows == "text" and self.captions is not None and not (self.instances or self.detections):
            raise SettingsError(
                "instances, detections: a text captioner reads the objects of an image. Name a file of them, or set "
                "rows to image"
            )
        if self.sample_count is not None and self.sample_count < 1:
            raise SettingsError("sample_count: must be at least 1")


def build_caption_data(data: CaptionData, target: splitting.Target) -> Record:
    """Write caption data; return its report, which is also written beside it. No image is on two sides.

    Raises:
        SettingsError: A file exists already, or the template is wrong.
        DataError: A file cannot be read, refers to what it does not hold, or nothing is left for a role.
    """
    clock = records.Clock()
    target.check_free()
    template = _compiled(data.template or TEMPLATE)
    images = _of_items(data.items) if data.items is not None else _of_coco(data)
    left_out: Counter[str] = Counter()
    found = []
    for image in logs.progress(images, "captions", len(images), "images"):
        row = _row(image, data, template)
        if isinstance(row, str):
            left_out[row] += 1
        else:
            found.append(row)
    chosen = splitting.sampled({str(row["image_id"]) for row in found}, data.sample_count, target.seed)
    found = [row for row in found if str(row["image_id"]) in chosen]
    roles = splitting.roles_of(Counter(str(row["image_id"]) for row in found), target.shares, target.seed)
    rows = {role: [row for row in found if roles[str(row["image_id"])] == role] for role in target.shares}
    choices = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(data).items()}
    facts = {
        "choices": choices | {"template": data.template or TEMPLATE},
        "images": {"seen": len(images), "left_out": dict(left_out)},
        "captions": {role: sum(len(row["captions"]) for row in own) for role, own in rows.items()},
    }
    return target.write(rows, facts, clock)


def _compiled(text: str) -> Template:
    """Return a template from its text, or from the file that the text names."""
    try:
        if len(text) < 500 and "{" not in text and Path(text).is_file():
            text = Path(text).read_text(encoding="utf-8")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        return environment.from_string(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise SettingsError(f"template: cannot be used: {error}") from error


def _row(image: Record, data: CaptionData, template: Template) -> Record | str:
    """Return the row of an image, or why it is left out."""
    captions = [str(text).strip() for text in image["captions"] if str(text or "").strip()]
    if not captions:
        return "without a caption"
    row = {"image_id": image["id"]}
    if data.rows == "image":
        if not image["image"]:
            raise DataError(f"{image['where']}: has no image. Name its file in the column image.")
        return row | {"image": image["image"], "captions": captions}
    if image["objects"] is not None and not image["objects"]:
        return "without an object"
    try:
        prompt = template.render(image["shown"]).strip()
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, OverflowError) as error:
        raise DataError(f"{image['where']}: the template cannot be filled in: {error}") from error
    return row | {"prompt": prompt, "captions": captions} if prompt else "with an empty prompt"


def _of_items(path: PathLike) -> list[Record]:
    """Return the images of a file of rows: {id, image, captions, objects, shown, where}."""
    found = []
    for number, item in enumerate(json_files.rows(path)):
        captions = [*json_files.as_list(item.get("captions")), *json_files.as_list(item.get("caption"))]
        shown = {key: value for key, value in item.items() if key not in ("caption", "captions")}
        own = next((item[key] for key in ("image_id", "image", "id") if item.get(key) is not None), f"row {number}")
        facts = {"id": own, "image": item.get("image"), "captions": captions, "objects": None, "shown": shown}
        found.append(facts | {"where": f"{path}, row {number} (from 0)"})
    return found


def _of_coco(data: CaptionData) -> list[Record]:
    """Return the images of COCO's annotations: {id, image, captions, objects, shown, where}."""
    annotated = _annotations(data.captions)
    images = {image["id"]: image for image in annotated["images"]}
    captions: dict[Json, list[str]] = {name: [] for name in images}
    for number, one in enumerate(annotated["annotations"]):
        where = f"{data.captions}, annotation {number} (from 0)"
        name = json_files.name(one, "image_id", where)
        if name not in captions:
            raise DataError(f"{where}: is of image {name}, which is not among the file's images.")
        captions[name].append(one.get("caption"))
    objects = _objects(data, annotated, images)
    return [
        {
            "id": name,
            "image": image.get("file_name"),
            "captions": captions[name],
            "objects": objects.get(name, []),
            "shown": {"image": image, "objects": objects.get(name, [])},
            "where": f"{data.captions}, image {name}",
        }
        for name, image in images.items()
    ]


def _annotations(path: PathLike) -> Record:
    """Return the content of a file of COCO's annotations, with `images` and `annotations`."""
    found = json_files.content(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), list) for key in ("images", "annotations")):
        raise DataError(f"{path}: is not in COCO's format: it needs the lists images and annotations.")
    for number, image in enumerate(found["images"]):
        json_files.name(image, "id", f"{path}, image {number} (from 0)")
    return found


def _objects(data: CaptionData, annotated: Record, images: Mapping[Json, Record]) -> dict[Json, list[Record]]:
    """Return image -> the objects in it, the surest first, then the largest."""
    instances = _annotations(data.instances) if data.instances is not None else {}
    path, listed = data.instances, instances.get("annotations", [])
    if data.detections is not None:
        path, listed = data.detections, json_files.rows(data.detections)
    sized = {image["id"]: image for image in instances.get("images", [])}
    named = [*annotated.get("categories", []), *instances.get("categories", [])]
    categories = f"{data.captions}, {data.instances}: a category"
    names = {json_files.name(one, "id", categories): json_files.cell(one, "name", categories) for one in named}
    found: dict[Json, list[Record]] = {}
    for number, one in enumerate(listed):
        where = f"{path}, object {number} (from 0)"
        image = json_files.name(one, "image_id", where)
        score = json_files.number(one.get("score", 1.0), "score", where)
        if image not in images or score < data.min_score or one.get("iscrowd"):
            continue
        name = one.get("category") or names.get(one.get("category_id"))
        if name is None:
            raise DataError(f"{where}: its category {one.get('category_id')} has no name. Give the file of instances.")
        shape = {**sized.get(image, {}), **images[image]}
        found.setdefault(image, []).append(_object(name, one, shape, where))
    return {image: sorted(own, key=lambda one: (-(one["score"] or 0), -one["area"])) for image, own in found.items()}


def _object(name: str, one: Record, image: Record, where: str) -> Record:
    box = json_files.as_list(json_files.cell(one, "bbox", where))
    wide, high = (json_files.number(image.get(key), f"image's {key}", where) for key in ("width", "height"))
    if len(box) != 4 or wide <= 0 or high <= 0:
        raise DataError(f"{where}: its bbox is {box} in a picture of {wide:g} x {high:g}; it must be four numbers.")
    x, y, width, height = (json_files.number(value, "bbox", where) for value in box)
    column = min(2, max(0, int(3 * (x + width / 2) / wide)))
    line = min(2, max(0, int(3 * (y + height / 2) / high)))
    share = width * height / (wide * high)
    size = next((word for least, word in SIZES if share >= least), SIZES[-1][1])
    place = PLACES[line][column]
    return {"name": name, "box": box, "area": width * height, "score": one.get("score"), "place": place, "size": size}


def summary(report: Record) -> list[str]:
    """Return the lines that the terminal shows of a report."""
    lines = [f"{report['images']['seen']:,} images seen"]
    lines += [f"  left out, {reason}: {count:,}" for reason, count in report["images"]["left_out"].items()]
    captions = report["captions"]
    return lines + [
        f"{role}: {own['rows']:,} rows, {captions[role]:,} captions" for role, own in report["roles"].items()
    ]
