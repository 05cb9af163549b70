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

from .library_errors import described

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

# The files of a processor that a tokenizer does not write
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Reader:
    """The tokenizer of a model, and the image processor of a model that sees.

    Attributes:
        tokenizer: the tokenizer.
        image_processor: None for a model that reads text only.
        files: the checkpoint's other processor files, which are kept as they are.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor | None = None
    files: tuple[Path, ...] = ()

    def save(self, folder: PathLike) -> None:
        """Write the tokenizer and the processor's files to a folder."""
        self.tokenizer.save_pretrained(folder)
        for file in self.files:
            shutil.copyfile(file, Path(folder) / file.name)


def seeing(folder: PathLike, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return the reader of a model that sees; folder: of its checkpoint.

    Raises:
        CheckpointError: The folder has no image processor that loads.
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
    return Reader(tokenizer, processor, files)
