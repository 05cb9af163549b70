"""What can be told of a task's definition (lm-eval's YAML) before any job: that it can be read, which metrics it has.

Nothing of a definition is run: its functions are Python code, and lm-eval takes seconds to import.
"""

from pathlib import Path

import yaml

from coppice.core.errors import SettingsError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEEPEST = 8  # definitions that include one another


def metrics(file, key, depth=0):
    """Names of the metrics of the task in `file`, with what it includes; None where they cannot be told.

    SettingsError, naming the configuration's `key`, where the file or one that it includes cannot be read.
    """
    root = _root(Path(file), key)
    if "metric_list" in root:
        return _named(root["metric_list"])
    if "include" not in root or depth == DEEPEST:
        return None
    node = root["include"]
    included = node.value if isinstance(node, yaml.SequenceNode) else [node]
    found = [metrics(Path(file).parent / str(one.value), key, depth + 1) for one in included]
    return next((names for names in reversed(found) if names), None)


def _root(file, key):
    """Key -> node of the mapping in a YAML file."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise SettingsError(f"{key}: {file}{where}: cannot be read as a task's definition ({reason})") from error
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{key}: {file}: cannot be read as a task's definition (it holds no keys)")
    return {str(name.value): node for name, node in root.value}


def _named(node):
    """The metrics of a `metric_list`; None where one of them is a function."""
    entries = node.value if isinstance(node, yaml.SequenceNode) else []
    names = [value for entry in entries for name, value in _pairs(entry) if name.value == "metric"]
    if not names or any(value.tag.startswith("!function") for value in names):
        return None
    return [str(value.value) for value in names]


def _pairs(node):
    return node.value if isinstance(node, yaml.MappingNode) else []
