"""A second, strict reading of the configuration files: a key given twice is an error, where YAML takes the last.

What no configuration needs and parsers choke on is refused too: nesting without end, aliases that hold themselves or
multiply.
"""

from pathlib import Path

import yaml

from coppice.core.errors import SettingsError

DEEPEST = 100  # levels of nesting: parsers recurse, and no configuration needs a tenth of it
MOST = 1_000_000  # values, with those behind each alias counted each time
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check(path):
    """Raise SettingsError if a mapping in the YAML or JSON file `path` holds a key twice, naming key and lines."""
    root = _parsed(path, _root)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}: holds no keys; a configuration file is a mapping such as 'results: results'")
    _size(path, root, {})
    _check_node(path, root, (), set())


def read(path):
    """The content of the configuration file `path`, checked; SettingsError where it cannot be had."""
    check(path)
    return _parsed(path, lambda text: yaml.load(text, Loader=LOADER)) or {}


def _parsed(path, parse):
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', error)})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as a configuration file ({error})") from error
    except ValueError as error:  # of what looks like a date or a number and is none
        raise SettingsError(f"{path}: holds a value that cannot be read ({error})") from error


def _root(text):
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=event.start_mark)
    return yaml.compose(text, Loader=LOADER)


def _size(path, node, known):
    """Values under `node`, aliases followed; SettingsError where they hold themselves or are too many."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None  # until it is done: met again before that, it holds itself
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(path, child, known) for child in children)
    if known[id(node)] is None or known[id(node)] > MOST:
        what = "holds itself" if known[id(node)] is None else f"stands for more than {MOST} values"
        raise SettingsError(f"{path}, line {node.start_mark.line + 1}: an alias {what}; write out what is meant")
    return known[id(node)]


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
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(f"{path}, line {line}: a key is a list or a mapping, and has to be text")
        here = (*keys, str(key.value))
        if key.value in lines:
            raise SettingsError(
                f"{path}: key {'.'.join(here)} is given twice, in lines {lines[key.value]} and {line}; keep one of them"
            )
        lines[key.value] = line
        _check_node(path, child, here, seen)
