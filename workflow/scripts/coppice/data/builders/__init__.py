"""Build data sets from what users have: source trees, annotated images, and files of rows.

`build_code_data` reads source trees and `build_caption_data` annotations; `split_data` divides the rows of a file. All
three write JSON lines for training and, beside them, for selection and report, with a report of how they were made.
"""

from .code import CodeData, build_code_data
from .splitting import Target

__all__ = ["CodeData", "Target", "build_code_data"]
