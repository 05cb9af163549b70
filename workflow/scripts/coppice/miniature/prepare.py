"""The miniature world and its models in the form that every stage reads: datasets with records, models with records."""

import json
import logging
from pathlib import Path

from coppice import data
from coppice.core import fingerprints, records

from . import pretraining
from .build import DATASETS, build_world

logger = logging.getLogger("coppice.miniature")


def prepare_world(folder, seed):
    """Generate the world into `folder` and write a `dataset.json` record for each of its datasets."""
    clock, folder = records.Clock(), Path(folder)
    build_world(folder, seed)
    for name, roles in DATASETS.items():
        tables = {role: _rows(folder / name / f"{role}.jsonl") for role in roles}
        if name == "ptb":
            tables = {role: [{"text": row["sentence"]} for row in rows] for role, rows in tables.items()}
        source = {"path": f"miniature/{name}", "seed": seed}
        data.write(name, tables, folder / name, splits={}, source=source, clock=clock)
        logger.info("%s: %s", name, ", ".join(f"{role} {len(rows)}" for role, rows in tables.items()))


def _rows(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prepare_model(name, corpus, parents, record, seed, steps=None, context=None):
    """Train the miniature model `name` (`llama`, `llama-instruct`, ...) and write its model.json to `record`.

    corpus: records of the text it is trained on; parents: for an instruct model the records of its base and of the
    instructions; steps: optimizer steps in place of the recipe's; context: length in tokens, likewise.
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
        | {"weights_fingerprint": fingerprints.weights(folder)}
        | {"provenance": clock.provenance({"steps": steps, "context": context}, seed)},
    )
