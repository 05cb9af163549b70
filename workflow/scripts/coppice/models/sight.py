"""Turn the pictures of examples into a model's inputs, and find out how many tokens each takes in the text.

Pictures are opened and processed when a batch runs, not before: the pixels of a data set do not fit in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from coppice.core.errors import DataError

from .kinds import Inputs
from .readers import Reader
from .rows import Picture

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class Seen:
    """The pictures of an example, in the order in which its text mentions them.

    Attributes:
        pictures: the pictures.
        processor: the model's image processor.
        token: the id that marks the places of the pictures' features.
        tokens: the number of these places.
    """

    pictures: tuple[Picture, ...]
    processor: BaseImageProcessor
    token: int
    tokens: int


def tokens_of(picture: Picture, reader: Reader) -> int:
    """Return the number of tokens that a picture takes.

    Raises:
        DataError: The image processor does not take a picture of this shape.
    """
    if reader.placeholder.count is not None:
        return reader.placeholder.count
    processor = reader.image_processor
    try:
        patches = processor.get_number_of_image_patches(picture.height, picture.width)
    except ValueError as error:
        raise DataError(
            f"{picture.path}: the image processor does not take its {picture.width} x {picture.height} pixels "
            f"({error}). Crop it, or remove its row."
        ) from error
    return patches // processor.merge_size**2


def inputs(seen: Sequence[Seen | None], ids: torch.Tensor) -> Inputs:
    """Return the model's inputs for the pictures of a batch, which go with its token ids [B, T].

    seen: of each row, or None. {} if no row has pictures.
    """
    having = [one for one in seen if one is not None]
    if not having:
        return {}
    processor = having[0].processor
    every = [picture for one in having for picture in one.pictures]
    with ThreadPoolExecutor() as pool:  # Pillow and numpy work beside each other
        found = list(pool.map(lambda picture: _processed(picture, processor), every))
    whole = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    if "image_grid_thw" in whole:  # positions in two dimensions, for which the model needs to know the places
        whole["mm_token_type_ids"] = (ids == having[0].token).int()
    return whole


def _processed(picture: Picture, processor: BaseImageProcessor) -> Mapping[str, torch.Tensor]:
    return dict(processor(picture.open(), return_tensors="pt"))
