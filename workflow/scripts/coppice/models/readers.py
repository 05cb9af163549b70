"""What turns a model's inputs into numbers: its tokenizer and, for a model that sees, its image processor.

Both come from files beside the weights. `Reader.save` writes them beside every checkpoint and adapter, so that
transformers' own `AutoProcessor` goes on to work there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.core.errors import CheckpointError
from coppice.core.json_text import parsed

from .library_errors import described

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

TEMPLATE = "chat_template.json"
# The files of a processor that a tokenizer does not write
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    TEMPLATE,
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Placeholder:
    """How a picture is written in the text that a model reads.

    Attributes:
        token: the token that becomes as many as the picture has features.
        text: what a prompt without a chat template writes for a picture; it contains the token once.
        count: the number of features of every picture; None if it depends on the picture's size.
    """

    token: str
    text: str
    count: int | None = None


@dataclass(frozen=True)
class Reader:
    """The tokenizer of a model, and the image processor of a model that sees.

    Attributes:
        tokenizer: the tokenizer.
        image_processor: None for a model that reads text only.
        files: the checkpoint's other processor files, which are kept as they are.
        placeholder: how a picture is written in text; None if the model's texts do not mention pictures.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor | None = None
    files: tuple[Path, ...] = ()
    placeholder: Placeholder | None = None

    def save(self, folder: PathLike) -> None:
        """Write the tokenizer and the processor's files to a folder."""
        self.tokenizer.save_pretrained(folder)
        for file in self.files:
            shutil.copyfile(file, Path(folder) / file.name)


def seeing(folder: PathLike, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return the reader of a model that sees; folder: of its checkpoint.

    Raises:
        CheckpointError: The folder has no image processor that loads, or its tokenizer lacks the token of pictures.
    """
    from transformers import AutoImageProcessor

    folder = Path(folder)
    try:
        # The backend that reads with Pillow and numpy alone: torchvision's may resize to slightly other pixels, and a
        # torchvision of another torch breaks every import of transformers.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:  # transformers does not check the file
        raise CheckpointError(
            f"{folder}: its image processor does not load: {described(error)}. Copy preprocessor_config.json of the "
            "original model into the folder."
        ) from error
    files = tuple(path for name in PROCESSOR_FILES if (path := folder / name).is_file())
    if not tokenizer.chat_template and (folder / TEMPLATE).is_file():
        # older checkpoints keep it with the processor only
        tokenizer.chat_template = parsed((folder / TEMPLATE).read_text(encoding="utf-8"))["chat_template"]
    return Reader(tokenizer, processor, files, _placeholder(folder, tokenizer))


def _placeholder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Placeholder | None:
    """Return how the model's configuration says that pictures are written in text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    token = getattr(config, "image_token_id", None)
    if token is None:
        return None
    around = [getattr(config, "vision_start_token_id", None), token, getattr(config, "vision_end_token_id", None)]
    ids = [one for one in around if one is not None]
    found = tokenizer.convert_ids_to_tokens(ids)
    if None in found:
        raise CheckpointError(
            f"{folder}: config.json writes pictures with the tokens {ids}, which the tokenizer does not have. Copy the "
            "tokenizer's files of the original model into the folder."
        )
    # models that read pictures of any size say how many patches become one feature
    any_size = hasattr(config.vision_config, "spatial_merge_size")
    count = None if any_size else getattr(config, "image_seq_length", None)
    return Placeholder(tokenizer.convert_ids_to_tokens(token), "".join(found), count)
