"""Build data sets from what users have: source trees, annotated images, and files of rows.

`build_code_data` reads source trees, `build_caption_data` annotations, and `split_data` divides the rows of a file. All
three write JSON lines for training and, beside them, for selection and report, with a report of how they were made.
"""

from .captions import CaptionData, build_caption_data
from .code import CodeData, build_code_data
from .grouped_rows import SplitData, split_data
from .splitting import Target

__all__ = ["CaptionData", "CodeData", "SplitData", "Target", "build_caption_data", "build_code_data", "split_data"]
