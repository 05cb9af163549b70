"""Read the configuration files a second time, strictly: a key given twice is an error here, while YAML takes the last.

The module also rejects YAML that no configuration needs and that exhausts parsers: very deep nesting, and aliases that
contain themselves or expand to huge structures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from coppice.core.aliases import PathLike, Record
from coppice.core.errors import SettingsError

Parsed = TypeVar("Parsed")

DEEPEST = 100  # levels of nesting: parsers recurse, and no configuration needs a tenth of that
MOST = 1_000_000  # values; those behind an alias count each time it is used
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def base() -> Path:
    """Return the file that every configuration starts from, as the Snakefile does.

    It is `config/config.yaml` of the working directory or, where there is none, of the checkout.
    """
    own = Path("config/config.yaml")
    return own if own.exists() else Path(__file__).resolve().parents[5] / own


def check(path: PathLike) -> None:
    """Check the YAML or JSON file `path`. Raises SettingsError, with key and lines, if a key is given twice."""
    root = _parsed(path, _root)
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}: has no keys; write a mapping such as 'results: results'")
    _size(path, root, {})
    _check_node(path, root, (), set())


def read(path: PathLike) -> Record:
    """Return the content of the configuration file `path`. Raises SettingsError if it is unreadable or invalid."""
    check(path)
    return _parsed(path, lambda text: yaml.load(text, Loader=LOADER)) or {}


def _parsed(path: PathLike, parse: Callable[[str], Parsed]) -> Parsed:
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', error)})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as a configuration file ({error})") from error
    except ValueError as error:  # PyYAML fails on text that only looks like a date or a number, such as 2020-13-45
        raise SettingsError(f"{path}: contains a value that cannot be read ({error}); correct or quote it") from error


def _root(text: str) -> yaml.Node | None:
    """Return the root node. Depth is checked on the stream of events, because composing nodes recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=event.start_mark)
    return yaml.compose(text, Loader=LOADER)


def _size(path: PathLike, node: yaml.Node | None, sizes: dict[int, int | None]) -> int:
    """Count the values under `node`, aliases expanded. Raises SettingsError for too many or an endless structure."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = None  # a node met again while this is still None contains itself
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(path, child, sizes) for child in children)
    if sizes[id(node)] is None or sizes[id(node)] > MOST:
        what = "contains itself" if sizes[id(node)] is None else f"expands to more than {MOST} values"
        raise SettingsError(f"{path}, line {node.start_mark.line + 1}: an alias {what}; write the values out instead")
    return sizes[id(node)]


def _check_node(path: PathLike, node: yaml.Node | None, keys: tuple[str, ...], seen: set[int]) -> None:
    if node is None or id(node) in seen:  # an alias leads to a node that is already checked
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
            raise SettingsError(f"{path}, line {line}: a key is a list or a mapping; use text as the key")
        here = (*keys, str(key.value))
        if key.value in lines:
            raise SettingsError(
                f"{path}: key {'.'.join(here)} is given twice, in lines {lines[key.value]} and {line}; remove one"
            )
        lines[key.value] = line
        _check_node(path, child, here, seen)
