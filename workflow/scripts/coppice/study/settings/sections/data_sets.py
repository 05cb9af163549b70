"""The sections `datasets` and `miniature`."""

from typing import Annotated, Literal

from pydantic import Field

from .forms import Named, Text
from .section import Section, is_unset, section, setting


class Splits(Section):
    """The split, or the file of a local folder or of the hub's repository, for each role.

    A name with a slash is a file of the repository. Null means there is none. Some names have other defaults: boolq,
    piqa, hellaswag and winogrande report on validation, alpaca and bookcorpus have only train, and the splits of
    miniatures are called like the roles.
    """

    train: str | None = setting("train", "Rows for training and calibration.")
    selection: str | None = setting("validation", "Rows on which candidates are scored.")
    report: str | None = setting("test", "Rows that all reports use.")


class Dataset(Section):
    """A data set."""

    path: Text | None = setting(
        None,
        "A hub id (`org/name`), a local file or folder, or `miniature/<name>`. If a format is set, the path "
        "is local. Null means the official data set of that name.",
    )
    name: str | None = setting(None, "Configuration of a hub data set, e.g. wikitext-2-raw-v1.")
    revision: str | None = setting(
        None, "Commit, tag or branch on the hub. Null means the newest commit at the first fetch."
    )
    format: Literal["json", "text", "csv", "parquet"] | None = setting(
        None, "Format of local files. json includes files with one object per line; text has one row per line."
    )
    columns: Named[Annotated[Text, Field(description="Name of the column in the data set.")]] = setting(
        {}, "Maps the column names that Coppice expects to those of the data set."
    )
    image_root: Text | None = setting(
        None,
        "Folder below which the images of the rows lie. Null means the folder of the data file.",
        exclude_if=is_unset,
    )
    splits: Splits = section(Splits)


class Miniature(Section):
    """The tiny models and data sets of `miniature/...`."""

    corpus: str = setting(
        "world", "Training text of the tiny models; `world` (generated) or the name of a data set (its train part)."
    )
    steps: int | None = setting(
        None,
        "Optimizer steps of each tiny model. Null means the number in its definition.",
        unit="steps",
        ge=1,
        le=10_000_000,
    )
    context: int | None = setting(
        None,
        "Context length of each tiny model in tokens. Null means 256, which is enough for every generated text.",
        unit="tokens",
        ge=16,
        le=100_000,
    )
