"""Name the types that recur in the signatures of all layers."""

import os
from typing import Any

PathLike = str | os.PathLike[str]
Json = Any  # a JSON value; not spelled out, because callers know what the key that they read holds
Record = dict[str, Json]  # a JSON object: the content of a record, a section of the configuration, a row of data
Estimate = dict[str, Json]  # {value, interval, ...} of a number: interval is [low, high], or None if it has none
