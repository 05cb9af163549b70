"""A second, strict reading of the configuration files: a key given twice is an error, where YAML takes the last."""

from pathlib import Path

import yaml

from ..errors import SettingsError


def check(path):
    """Raise SettingsError if a mapping in the YAML or JSON file `path` holds a key twice, naming key and lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as a configuration file ({error})") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', error)})") from error
    _check_node(path, root, (), set())


def _check_node(path, node, keys, seen):
    if node is None or id(node) in seen:  # an alias of something already checked
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check_node(path, child, (*keys, str(i)), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines = {}
    for key, child in node.value:
        here = (*keys, str(key.value))
        line = key.start_mark.line + 1
        if key.value in lines:
            raise SettingsError(
                f"{path}: key {'.'.join(here)} is given twice, in lines {lines[key.value]} and {line}; keep one of them"
            )
        if isinstance(key, yaml.ScalarNode):
            lines[key.value] = line
        _check_node(path, child, here, seen)
