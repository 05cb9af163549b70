"""A second, strict reading of the configuration files: a key given twice is an error, where YAML takes the last."""

import json
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
        if not _is_json(path, text):
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise SettingsError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', error)})") from error
        return
    _check_node(path, root, (), set())


def _is_json(path, text):
    """Whether `text` is JSON (which may hold tabs that YAML refuses), its keys checked."""

    def check_pairs(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise SettingsError(f"{path}: key '{key}' is given twice")
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=check_pairs)
    except ValueError:
        return False
    return True


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
