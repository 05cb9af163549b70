"""JSON that others wrote: whatever is wrong with it is a ValueError. Needs nothing that takes time to import."""

import json


def parsed(text):
    """What the JSON `text` holds; ValueError whatever is wrong with it, brackets nested without end too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
