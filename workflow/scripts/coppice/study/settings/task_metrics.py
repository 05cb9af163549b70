"""Read the metrics of a task from its definition (lm-eval's YAML) before any job runs.

The module only parses the YAML. It does not run a definition's Python functions, and it does not import lm-eval, which
takes seconds.
"""

from pathlib import Path

import yaml

from coppice.core.aliases import PathLike
from coppice.core.errors import SettingsError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEEPEST = 8  # levels of `include`; the limit also ends files that include each other


def metrics(file: PathLike, key: str, depth: int = 0) -> list[str] | None:
    """Return the metric names of the task defined in `file` or in a file that it includes; None if YAML does not say.

    Raises:
        SettingsError: the file, or one that it includes, cannot be read; the message names the configuration's `key`.
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


def _root(file: Path, key: str) -> dict[str, yaml.Node]:
    """Return {key: node} of the mapping in a YAML file."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise SettingsError(f"{key}: {file}{where}: cannot be read as a task definition ({reason})") from error
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{key}: {file}: cannot be read as a task definition (it has no keys)")
    return {str(name.value): node for name, node in root.value}


def _named(node: yaml.Node) -> list[str] | None:
    """Return the names in a `metric_list`; None if one is a function, whose metrics are unknown without running it."""
    entries = node.value if isinstance(node, yaml.SequenceNode) else []
    names = [value for entry in entries for name, value in _pairs(entry) if name.value == "metric"]
    if not names or any(value.tag.startswith("!function") for value in names):
        return None
    return [str(value.value) for value in names]


def _pairs(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []
