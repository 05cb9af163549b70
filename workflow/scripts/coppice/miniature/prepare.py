"""Write the miniature world and its models in the form that every stage reads, with their records."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record

from . import pretraining
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


def _rows(path: Path) -> list[Record]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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
    source = {"kind": "miniature", "path": name}
    records.write(
        record,
        {"model": name, "source": source, "path": str(folder), "training": facts}
        | {"parameters": models.count_parameters(folder), "weights_fingerprint": fingerprints.weights(folder)}
        | {"provenance": clock.provenance({"steps": steps, "context": context}, seed)},
    )
