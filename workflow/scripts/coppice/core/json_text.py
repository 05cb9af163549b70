"""Parse JSON that others wrote, so that every problem with it is a ValueError. This module imports nothing slow."""

import json

from .aliases import Json


def parsed(text: str | bytes) -> Json:
    """Return the content of the JSON `text`; raise ValueError for every problem, also brackets nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
