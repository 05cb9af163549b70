"""Write the miniature world and its models in the form that every stage reads, with their records."""

import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.data import builders
from coppice.data.builders import splitting

from . import code_world, kind_training, picture_world, pretraining
from .build import DATASETS, build_world

logger = logging.getLogger("coppice.miniature")


def prepare_world(folder: PathLike, seed: int) -> None:
    """Generate the world in `folder` and write a `dataset.json` record for each of its datasets."""
    clock, folder = records.Clock(), Path(folder)
    build_world(folder, seed)
    for name, roles in DATASETS.items():
        tables = {role: _rows(folder / name / f"{role}.jsonl") for role in roles}
        if name == "ptb":
            tables = {role: [{"text": row["sentence"]} for row in rows] for role, rows in tables.items()}
        origin = data.Origin({"path": f"miniature/{name}", "seed": seed})
        data.write(name, tables, folder / name, origin, clock)
        logger.info("%s: %s", name, ", ".join(f"{role} {len(rows)}" for role, rows in tables.items()))


def prepare_pictures(folder: PathLike, seed: int) -> None:
    """Draw the pictures of the picture world in `folder` and write the rows and the record of its data sets."""
    clock, folder = records.Clock(), Path(folder)
    for name, tables in picture_world.build_pictures(folder, seed).items():
        # A path relative to the record, so that the folder can move
        roots = {role: f"../{picture_world.PICTURES}" for role, rows in tables.items() if "images" in rows[0]}
        origin = data.Origin({"path": f"miniature/{name}", "seed": seed}, image_roots=roots)
        data.write(name, tables, folder / name, origin, clock)


def prepare_code(folder: PathLike, seed: int) -> None:
    """Build the data sets of code in `folder` from a generated source tree, as users build theirs from their own.

    The rows of `code` are spans to fill in, and those of `code-files` the whole files that they come from, in the same
    roles.
    """
    clock, folder = records.Clock(), Path(folder)
    target = splitting.Target(folder / "code" / "spans.jsonl", code_world.RATIOS, seed, force=True)
    # Elsewhere, because the builder skips what Git ignores, and a checkout may ignore the folder of the data
    with tempfile.TemporaryDirectory() as place:
        code_world.build_tree(Path(place, "miniature"), seed)
        builders.build_code_data(builders.CodeData([Path(place, "miniature")]), target)
    spans = {role: _rows(target.file_of(role)) for role in target.shares}
    for name, tables in (("code", spans), ("code-files", {role: _files(rows) for role, rows in spans.items()})):
        data.write(name, tables, folder / name, data.Origin({"path": f"miniature/{name}", "seed": seed}), clock)


def _files(spans: Iterable[Record]) -> list[Record]:
    found = {row["path"]: row["prefix"] + row["middle"] + row["suffix"] for row in spans}
    return [{"path": path, "text": text} for path, text in found.items()]


def _rows(path: Path) -> list[Record]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prepare_kind(name: str, rows: Sequence[PathLike], record: PathLike, seed: int, steps: int | None = None) -> None:
    """Train a miniature model that is described in `KIND_MODELS` and write its model.json.

    Args:
        name: name of the model (`t5`, `clip`, ...).
        rows: paths of the records of the data sets to train on.
        record: path of the model.json to write.
        seed: seed of the training.
        steps: number of optimizer steps, if not the one of `KIND_MODELS`.
    """
    clock, folder = records.Clock(), Path(record).parent / "checkpoint"
    facts = kind_training.train_kind(name, rows, folder, seed, steps)
    _write_record(record, name, folder, facts, clock.provenance({"steps": steps}, seed))


def prepare_model(
    name: str,
    corpus: Iterable[PathLike],
    parents: Sequence[PathLike],
    record: PathLike,
    seed: int,
    steps: int | None = None,
    context: int | None = None,
) -> None:
    """Train a miniature model and write its model.json.

    Args:
        name: name of the model (`llama`, `llama-instruct`, ...).
        corpus: paths of the records of the text to train on.
        parents: for an instruct model, the paths of the records of its base model and of the instructions.
        record: path of the model.json to write.
        seed: seed of the training.
        steps: number of optimizer steps, if not the one of `TINY_MODELS`.
        context: context length in tokens, if not the one of `TINY_MODELS`.
    """
    clock = records.Clock()
    family, _, instruct = name.partition("-")
    folder = Path(record).parent / "checkpoint"
    if instruct:
        base, instructions = parents
        text = pretraining.Text.of_records(corpus, instructions)
        facts = pretraining.train_instruct(family, Path(records.read(base)["path"]), text, folder, seed, steps, context)
    else:
        facts = pretraining.train_base(family, pretraining.Text.of_records(corpus), folder, seed, steps, context)
    _write_record(record, name, folder, facts, clock.provenance({"steps": steps, "context": context}, seed))


def _write_record(record: PathLike, name: str, folder: Path, training: Record, provenance: Record) -> None:
    records.write(
        record,
        {"model": name, "source": {"kind": "miniature", "path": name}, "path": str(folder), "training": training}
        | {"parameters": models.count_parameters(folder), "weights_fingerprint": fingerprints.weights(folder)}
        | {"provenance": provenance},
    )
