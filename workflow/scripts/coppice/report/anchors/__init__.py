"""Compare a study's numbers with published ones of the same model under the same protocol.

The published values are in `published.yaml`, each with its source; none is computed or guessed. A study's number stands
beside one only if its record says that it measured the same model (its base id, dense or pruned by the same settings)
on the same split, joined and cut in the same way. Only BOS may differ, because its effect is small; the row then says
so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from coppice.core.aliases import Json, Record
from coppice.report.study_report.study_records import Pair, Study

if TYPE_CHECKING:
    from rich.table import Table

PUBLISHED = Path(__file__).with_name("published.yaml")
WINDOWS = ("split", "join", "seq_len", "stride")  # what of a perplexity protocol must be equal
COLUMNS = ("model", "pruning", "protocol", "published", "source")


class Protocol(BaseModel):
    """How a value was measured: a text cut into windows, or a task's metric."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    split: str | None = None
    join: str | None = None
    seq_len: int | None = None
    stride: int | None = None
    bos: str | None = None
    task: str | None = None
    metric: str | None = None
    num_fewshot: int | None = None

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        needed = ("text", *WINDOWS, "bos") if self.text else ("task", "metric", "num_fewshot")
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"a protocol lacks {', '.join(missing)}")
        return self

    @property
    def words(self) -> str:
        """The protocol in words."""
        if self.text:
            return f"{self.text} {self.split}, rows joined by {self.join!r}, {self.seq_len} tokens, BOS {self.bos}"
        return f"{self.task} {self.metric}, {self.num_fewshot}-shot"


class Result(BaseModel):
    """The values of one model. pruning: settings of a grid point, None for the dense model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str]
    values: dict[str, float]
    pruning: dict[str, Any] | None = None
    note: str = ""


class Publication(BaseModel):
    """A source, its protocols and its results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    url: str
    revision: str
    protocols: dict[str, Protocol]
    results: list[Result]


class Anchor(BaseModel):
    """One published value, and the study's own: value and what differs in how it was measured."""

    model_config = ConfigDict(frozen=True)

    publication: Publication
    result: Result
    protocol: Protocol
    published: float
    own: float | None = None
    measured_as: str = ""
    difference: str = ""

    @property
    def relative(self) -> float | None:
        """The relative difference of the study's number from the published one."""
        return None if self.own is None else self.own / self.published - 1

    @property
    def cells(self) -> list[str]:
        """What `COLUMNS` shows."""
        cited = f"{self.publication.source}, {self.publication.revision}"
        shown = f"{self.published:.4f}" if self.protocol.task else f"{self.published:.2f}"
        return [self.result.models[0], _pruning(self.result), self.protocol.words, shown, cited]


def published() -> list[Anchor]:
    """Return every published value, without a study."""
    entries = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    found = []
    for publication in map(Publication.model_validate, entries):
        for result in publication.results:
            for name, value in result.values.items():
                protocol = publication.protocols[name]
                found.append(Anchor(publication=publication, result=result, protocol=protocol, published=value))
    return found


def compared(study: Study) -> list[Anchor]:
    """Return every published value, each once for every number of the study that it can be compared with.

    A value that the study did not measure is there once, without a number of the study.
    """
    rows = []
    for anchor in published():
        found = []
        for name, facts in study.models.items():
            if facts["base"] in anchor.result.models:
                found += [anchor.model_copy(update=own) for own in _own(study.pairs_of(name), anchor)]
        rows += found or [anchor]
    return rows


def _own(pairs: list[Pair], anchor: Anchor) -> Iterator[Json]:
    """Yield {own, measured_as, difference} for each number of a model's pairs that the anchor can be compared with."""
    seen = set()
    for pair in pairs:
        pruning = anchor.result.pruning
        record, who = (pair.dense, pair.model) if pruning is None else (pair.pruned, f"{pair.model} {pair.candidate}")
        if record is None or who in seen or not _same_pruning(pruning, pair.selection):
            continue
        measured = _of_text(record, anchor.protocol) if anchor.protocol.text else _of_task(record, anchor.protocol)
        if measured is not None:
            seen.add(who)
            value, difference = measured
            yield {"own": value, "measured_as": who, "difference": difference}


def _same_pruning(wanted: Mapping[str, Any] | None, selection: Record | None) -> bool:
    """Return whether the chosen candidate was pruned as `wanted`; true for the dense model."""
    if wanted is None:
        return True
    done = (selection or {}).get("pruning") or {}
    # with a pattern, the ratio is not used; without one, no pattern may have been
    keys = ("method", "importance", "pattern", "parts", "keep_blocks", *(() if wanted.get("pattern") else ("ratio",)))
    plain = {"ranking": ("uniform", None), "steps": (1, None)}
    return all(done.get(key) == wanted.get(key) for key in keys) and all(
        done.get(key) in values for key, values in plain.items()
    )


def _of_text(record: Record, wanted: Protocol) -> tuple[float, str] | None:
    """Return (perplexity, what differs) of the wanted text, under whichever protocol of the record is the same."""
    for texts in (record.get("perplexity") or {}, *(record.get("perplexity_more") or {}).values()):
        found = texts.get(wanted.text)
        used = found and found["protocol"]
        if used and all(used.get(key) == getattr(wanted, key) for key in WINDOWS):
            bos = {False: "none", True: "every-window"}.get(used.get("bos"), used.get("bos"))
            return found["value"], "" if bos == wanted.bos else f"BOS {bos}"
    return None


def _of_task(record: Record, wanted: Protocol) -> tuple[float, str] | None:
    """Return (score, "") of the wanted task and metric, if the prompts had as many examples and no chat template."""
    found = (record.get("zero_shot") or {}).get(wanted.task)
    if not found or found.get("num_fewshot") != wanted.num_fewshot or found.get("chat_template"):
        return None
    limit = ((record["provenance"].get("settings") or {}).get("zero_shot") or {}).get("limit")
    value = found.get(wanted.metric)
    return None if limit or value is None else (value, "")


def _pruning(result: Result) -> str:
    if result.pruning is None:
        return "dense"
    settings = ", ".join(f"{key} {_word(value)}" for key, value in result.pruning.items())
    return f"{settings}{f' ({result.note})' if result.note else ''}"


def _word(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {number}" for key, number in value.items())
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def table(anchors: list[Anchor]) -> Table:
    """Return the table for the terminal; the study's columns are empty where it measured nothing comparable."""
    from rich.table import Table

    shown = Table(*COLUMNS, "this study", "difference", "measured on", "differs in")
    for anchor in anchors:
        own = "" if anchor.own is None else f"{anchor.own:.4g}"
        relative = "" if anchor.relative is None else f"{anchor.relative:+.2%}"
        shown.add_row(*anchor.cells, own, relative, anchor.measured_as, anchor.difference)
    return shown


def markdown() -> str:
    """Return all published values as the table of the documentation, with links to their sources."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for anchor in published():
        *cells, cited = anchor.cells
        lines.append(f"| {' | '.join(cells)} | [{cited}]({anchor.publication.url}) |")
    return "\n".join(lines) + "\n"
