"""Choose the spans of a source file that a model learns to fill in.

A span of Python is a syntactic unit: the body of a function, the lines of a block, or a statement of one line. Of other
languages, and of Python that does not parse, it is a line or a run of lines.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

SHORTEST, LONGEST = 3, 2000  # characters of a span, without the spaces around it
MOST_LINES = 12  # of a run of lines
END_OF_LINE = re.compile(rb"\r\n|\r|\n")  # as Python's parser counts lines, which is not how str.splitlines does
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.ExceptHandler)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Span(NamedTuple):
    """A span of a file and what surrounds it: prefix + middle + suffix is the file.

    `kind` is "body" (of a function), "block", "line", or "lines".
    """

    kind: str
    prefix: str
    middle: str
    suffix: str


def spans(text: str, language: str, count: int, seed: str) -> list[Span]:
    """Return at most `count` spans of a file, in the order of their places.

    The kinds of spans take turns, so that short ones do not crowd out the others.

    Args:
        text: the file.
        language: its language, as `code_filters.language_of` names it.
        count: the most spans.
        seed: chooses the spans; the same text, language, count and seed give the same ones.
    """
    content, generator = text.encode(), random.Random(seed)
    found = _python(text) if language == "python" else None
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for kind, start, stop in sorted(found if found is not None else set(_lines(content, generator))):
        middle = content[start:stop].strip()
        if SHORTEST <= len(middle) <= LONGEST and not middle.startswith((b"#", b"//", b"import ", b"from ")):
            by_kind.setdefault(kind, []).append((start, stop))
    for places in by_kind.values():
        generator.shuffle(places)
    chosen: list[tuple[int, int, str]] = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [(*places.pop(), kind) for kind, places in sorted(by_kind.items()) if places]
    return [_span(content, *place) for place in sorted(chosen[:count])]


def _span(content: bytes, start: int, stop: int, kind: str) -> Span:
    return Span(kind, content[:start].decode(), content[start:stop].decode(), content[stop:].decode())


def _starts(content: bytes) -> list[int]:
    """Return where each line begins."""
    return [0, *(found.end() for found in END_OF_LINE.finditer(content))]


def _python(text: str) -> set[tuple[str, int, int]] | None:
    """Return (kind, start, stop) of the syntactic spans of a Python file in bytes; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in the files of others
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what the parser raises for text that is no Python
        return None
    starts, found = _starts(text.encode()), set()
    for node in _statements(tree):
        if isinstance(node, FUNCTIONS):
            statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            kind = "body"
        else:
            statements, kind = (node.body, "block") if isinstance(node, BLOCKS) else ([], "")
        if statements:
            found.add((kind, *_extent(starts, statements[0], statements[-1])))
        is_simple = isinstance(node, ast.stmt) and not hasattr(node, "body") and not isinstance(node, ast.Match)
        if is_simple and node.lineno == node.end_lineno and not _is_text(node):
            found.add(("line", *_extent(starts, node, node)))
    return found


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the statements of a module, with the handlers and cases among them, and nothing of their expressions."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            left += getattr(node, part, [])


def _extent(starts: list[int], first: ast.stmt, last: ast.stmt) -> tuple[int, int]:
    """Return the bytes from the first statement's beginning (a decorator's, if it has one) to the last one's end."""
    begin = starts[first.lineno - 1] + first.col_offset
    if decorators := getattr(first, "decorator_list", None):
        begin = starts[decorators[0].lineno - 1] + decorators[0].col_offset - len("@")
    return begin, starts[last.end_lineno - 1] + last.end_col_offset


def _is_text(node: ast.stmt) -> bool:
    """Return whether a statement is only a string: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _lines(content: bytes, generator: random.Random) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, start, stop) of each line, without its indentation and end, and of a run that begins there."""
    starts = [*_starts(content), len(content)]
    lines = [content[start:stop] for start, stop in itertools.pairwise(starts)]
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        start = starts[number] + len(line) - len(line.lstrip())
        yield "line", start, starts[number] + len(line.rstrip())
        last = min(number + generator.randint(2, MOST_LINES), len(lines)) - 1
        while last > number and not lines[last].strip():
            last -= 1
        if last > number:
            yield "lines", start, starts[last] + len(lines[last].rstrip())
