"""The section `candidates`: the table or the grid of pruned checkpoints."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from .forms import Number, Unique
from .section import Section, section, setting

Importance = Literal[
    "block-influence",
    "perplexity",
    "taylor",
    "taylor-second",
    "taylor-mixed",
    "activation",
    "wanda",
    "wanda-one-shot",
    "sparsegpt",
    "magnitude",
]


class KeepBlocks(Section):
    """Blocks that are not pruned (depth and width). For width, the ratio is that of the other blocks."""

    first: int = setting(0, "Number of blocks at the beginning.", ge=0, le=10_000)
    last: int = setting(0, "Number of blocks at the end.", ge=0, le=10_000)


class GridPoint(Section):
    """One way to prune."""

    model_config = ConfigDict(json_schema_extra={"reruns": ["prune"]})

    method: Literal["depth", "width", "unstructured"] = setting(
        ...,
        "depth removes whole layers, width removes MLP channels and attention groups, unstructured sets "
        "single weights to zero.",
    )
    ratio: Number = setting(..., "Share that is removed, between 0 and 1.", gt=0, lt=1)
    tower: str | None = setting(
        None,
        "The tower of the model that is pruned: encoder or decoder (seq2seq), text or vision (dual-encoder), text "
        "(image-text and causal-lm). Null means both towers of seq2seq and dual-encoder models, by the same share.",
    )
    importance: Importance | None = setting(
        None,
        "Importance measure that decides what is removed. For depth: block-influence (the default), perplexity (of "
        "the calibration text without the block) or taylor. For width: taylor (the default; LLM-Pruner's "
        "param_first), taylor-second (param_second), taylor-mixed (param_mix), activation or magnitude. For "
        "unstructured: wanda (the default), wanda-one-shot (which measures all inputs on the dense "
        "model), sparsegpt (which also updates the weights that stay) or magnitude.",
    )
    parts: Annotated[Unique[Literal["mlp", "attention"]], Field(min_length=1)] | None = setting(
        None, "The parts that are narrowed (width only; by default both)."
    )
    ranking: Literal["uniform", "global"] | None = setting(
        None,
        "uniform (the default) removes the same share from every layer. global removes the least important "
        "parts of the whole model, so that layers differ in width (width only).",
    )
    pattern: str | None = setting(
        None,
        "Pattern n:m, such as 2:4 or 4:8: of every m weights in a row, n stay (unstructured only; the ratio must be "
        "1 - n/m). GPUs can exploit 2:4.",
        pattern="^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$",
    )
    consecutive: bool | None = setting(
        None, "Whether the removed layers form one block (depth only; by default false)."
    )
    keep_blocks: KeepBlocks | None = setting(
        None, "Blocks that are not pruned (depth and width). For width, the ratio is that of the other blocks."
    )
    steps: int | None = setting(
        None,
        "Number of steps in which the share is removed; the importance is measured again before each (depth and width; "
        "by default 1).",
        ge=1,
        le=1000,
    )
    name: str | None = setting(
        None,
        "The candidate's name. Null means a name made from the point's values, e.g. `width-0.5-taylor`.",
        reruns=["select"],
    )


class Calibration(Section):
    """The text on which the importance of weights is measured."""

    dataset: str = setting("wikitext2", "Name of the data set; its train part is used.")
    samples: int = setting(128, "Number of sequences.", unit="sequences", ge=1, le=10_000_000)
    length: int = setting(512, "Tokens per sequence.", unit="tokens", ge=2, le=10_000_000)
    windows: Literal["running", "within-rows"] | None = setting(
        None,
        "How sequences are cut out of the rows. `running` begins at any place and goes on over the ends of rows, for "
        "rows that follow each other in one text. `within-rows` takes a part of one row, for rows that are documents "
        "of their own. Null means within-rows for c4 and running for all others.",
    )


class Candidates(Section):
    """The pruned checkpoints to choose from."""

    table: str | None = setting(
        None,
        "TSV or CSV file of your own checkpoints. Columns: model, candidate, path; optionally acc, ppl and "
        "any others. Null means that Coppice prunes the models.",
        reruns=["data", "prune"],
    )
    prune: list[GridPoint] = setting(
        [GridPoint(method="depth", ratio=0.25), GridPoint(method="width", ratio=0.25, importance="taylor")],
        "The grid; each point gives one candidate of each model. Ignored if a table is given.",
        reruns=["select"],
    )
    per_job: Literal["one", "all"] = setting(
        "one",
        "Whether one job prunes or scores one candidate, or all candidates of a model. `all` suits models so "
        "small that starting a job takes longer than pruning. If the models' candidates have different names, each "
        "has a job of its own.",
    )
    keep: Literal["selected", "all"] = setting(
        "selected",
        "Whose weights stay after all configs have chosen. `selected` deletes the weights of candidates that "
        "no config chose. Their records stay, and a candidate that is needed later is pruned again. Your own "
        "checkpoints are never touched.",
        reruns=["nothing"],
    )
    calibration: Calibration = section(Calibration)
