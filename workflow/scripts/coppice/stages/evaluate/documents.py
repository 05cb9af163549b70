"""Find the documents of a text, and the loss of each: what is independent in a text, and so what intervals resample.

WikiText is a list of rows in which an article begins with a row ` = Title = `; its sections have more equals signs. A
text without such rows, like PTB, is one document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy

from coppice.core.aliases import Record

TITLE = re.compile(r"\s*= [^=\s](.*[^=\s])? =\s*")


def first_rows(rows: Sequence[str]) -> list[int]:
    """Return the rows that each document begins with: row 0, and every title after it.

    Blank rows surround a title, which tells it from a formula; before the first document there are only blank rows.
    """
    blank = [not row.strip() for row in rows] + [True]
    titles = [
        place
        for place, row in enumerate(rows)
        if TITLE.fullmatch(row) and blank[place - 1 if place else -1] and blank[place + 1]
    ]
    if titles and all(blank[: titles[0]]):
        titles[0] = 0
    return titles if titles[:1] == [0] else [0, *titles]


def starts(rows: Sequence[str], join: str) -> numpy.ndarray:
    """Return the character [documents] that each document of `rows` joined by `join` begins with."""
    begins = numpy.concatenate([[0], numpy.cumsum([len(row) + len(join) for row in rows])])
    return begins[first_rows(rows)]


def losses(scored: Sequence[numpy.ndarray], places: Sequence[numpy.ndarray], count: int) -> list[Record]:
    """Return {nll_per_token, tokens} of each document.

    Args:
        scored: for each window, the losses of its scored tokens, in nats.
        places: for each window, the documents of these tokens.
        count: of documents. One without a scored token has a loss of 0, so that all tokenizers give as many.
    """
    owner, values = numpy.concatenate(places), numpy.concatenate(scored)
    tokens = numpy.bincount(owner, minlength=count)
    totals = numpy.bincount(owner, weights=values, minlength=count)
    means = totals / numpy.maximum(tokens, 1)
    return [{"nll_per_token": float(mean), "tokens": int(count)} for mean, count in zip(means, tokens, strict=True)]
