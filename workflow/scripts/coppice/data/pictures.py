"""Check and open the pictures of a data set, and bring every sort of image to 8-bit RGB in one way.

A prepared row names its pictures with the digest of their bytes, so that a picture that changes after the rows were
prepared is an error. Pillow's decoders of photographs and drawings are used, and none that runs another program.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError

from .picture_rows import COLUMN

if TYPE_CHECKING:
    from coppice.models import Reader
    from coppice.models.readers import Placeholder

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # where Pillow begins to suspect a decompression bomb: 89 million
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values that exchange width and height
STORED = "pictures"  # the folder, beside dataset.json, of pictures whose bytes came with the rows


class Unusable(ValueError):
    """A picture cannot be used; the message is a clause about it, such as "is missing"."""


@dataclass(frozen=True)
class Facts:
    """What a row holds about a picture. Width and height are in pixels, after rotation."""

    path: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture(Facts):
    """A picture of a prepared row; `root` is the folder that its path is relative to."""

    root: Path

    def open(self) -> Image.Image:
        """Return the picture in RGB.

        Raises:
            DataError: The file is missing or was changed.
        """
        path = self.root / self.path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: the picture cannot be read ({error.strerror}). Put it back, or delete the data set's "
                "dataset.json and run again."
            ) from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(
                f"{path}: the picture was changed after its data set was prepared (its checksum differs). Put it back, "
                "or delete the data set's dataset.json and run again."
            )
        return decoded(content)


@dataclass(frozen=True)
class Album:
    """The pictures of one role of a prepared data set, for a model that sees.

    Attributes:
        root: the folder that paths are relative to; None if the rows have no pictures.
        placeholder: how a picture is written in the model's text; None if the model's text does not mention pictures.
    """

    root: Path | None
    placeholder: Placeholder | None

    def of_row(self, row: Mapping[str, Any]) -> list[Picture]:
        """Return the pictures of a row."""
        return [Picture(**facts, root=self.root) for facts in row.get(COLUMN) or () if self.root]


def album(record: PathLike, role: str, reader: Reader) -> Album:
    """Return the album of one role of the data set whose dataset.json is `record`."""
    return Album(root_of(record, role), reader.placeholder)


def root_of(record: PathLike, role: str) -> Path | None:
    """Return the folder of the pictures of one role of the data set whose dataset.json is `record`."""
    root = records.read(record)["roles"].get(role, {}).get("image_root")
    return Path(record).parent / root if root else None


def inspect(content: bytes) -> tuple[int, int, bool]:
    """Decode a picture and return (width, height, whether it is animated), after rotation.

    Raises:
        Unusable: It is damaged, too large or of no supported format.
    """
    image = _opened(content)
    width, height = image.size
    jpeg = image.format in ("JPEG", "MPO")  # MPO: a photograph and its previews, which are no animation
    animated = getattr(image, "is_animated", False) and not jpeg
    if jpeg:  # decoding at an eighth of the size reads all of the file in a third of the time
        image.draft("L", (width // 8, height // 8))
    if _loaded(image).getexif().get(ORIENTATION) in TURNED:
        width, height = height, width
    if not jpeg:
        _rgb(image)
    return width, height, animated


def decoded(content: bytes) -> Image.Image:
    """Return a picture in RGB: rotated as its EXIF data says, the first frame, on white where it is transparent.

    Raises:
        Unusable: It is damaged, too large or of no supported format.
    """
    return _loaded(_rgb(_opened(content)))


def facts_of(path: str, content: bytes) -> tuple[Record, bool]:
    """Return what a row holds about a picture, and whether it is animated. Raise Unusable if it cannot be used."""
    width, height, animated = inspect(content)
    return asdict(Facts(path, hashlib.sha256(content).hexdigest(), width, height)), animated


def _opened(content: bytes) -> Image.Image:
    """Return an image whose header is read and whose size is acceptable."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unusable(f"has more than {MOST_PIXELS // 10**6} million pixels; scale it down") from error
    except UnidentifiedImageError as error:
        if b"<svg" in content[:4096].lower():
            raise Unusable("is an SVG drawing; convert it to PNG") from error
        raise Unusable(f"is not an image that can be read ({', '.join(FORMATS)})") from error
    except Exception as error:  # a damaged header makes Pillow raise many types
        raise Unusable(f"is damaged ({error})") from error
    if image.width * image.height > MOST_PIXELS:
        raise Unusable(
            f"has {image.width} x {image.height} pixels, more than {MOST_PIXELS // 10**6} million; scale it down"
        )
    return image


def _loaded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # decoders raise many types for damaged data
        raise Unusable(f"is truncated or damaged ({error})") from error
    return image


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(_loaded(image))
    if image.mode == "F":
        raise Unusable("has fractions as pixels, whose white is not known; convert it to 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = numpy.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise Unusable("has more than 16 bits a pixel, whose white is not known; convert it to 8 bits")
        # Pillow's own conversion would cut off at 255 and leave a white picture
        image = Image.fromarray((values >> 8).astype(numpy.uint8))
    if image.has_transparency_data:
        # below full transparency, editors leave any color; without this, it would show
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def named(shown: Sequence[str], most: int = 8) -> str:
    """Return the first problems and how many there are more."""
    more = f"; and {len(shown) - most} more" if len(shown) > most else ""
    return "; ".join(shown[:most]) + more
