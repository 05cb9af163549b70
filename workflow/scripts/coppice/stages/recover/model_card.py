"""Write the model card of an adapter: what it was made from, how it was trained, and how to load it."""

from pathlib import Path

import jinja2

from coppice import models
from coppice.core.aliases import Record
from coppice.core.records import atomic
from coppice.models import sparsity

from .training_request import TrainingRequest, TrainingSettings

TEMPLATE = Path(__file__).with_name("card.md.j2")


def write(request: TrainingRequest, settings: TrainingSettings, outcome: Record, weights: str) -> None:
    """Write `README.md` into the adapter's folder.

    Args:
        request: what was asked for.
        settings: as trained.
        outcome: facts about the training.
        weights: fingerprint of the checkpoint's weights.
    """
    card = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    kind = models.kind_of(request.source)
    found = (outcome.get("sparsity") or {}).get("before")
    text = card.render(
        model=request.identity["model"],
        auto=kind.auto_class().__name__,
        pipeline=kind.pipeline,
        sees=kind.sees,
        name=request.identity.get("candidate") or request.identity["config"],
        lora=settings.lora,
        settings=settings.recorded(request.prompt),
        outcome=outcome,
        source=request.source.path,
        literal=repr(request.source.path),  # as a Python literal, because the path may contain quotes
        weights=weights,
        sparse=sparsity.described(found) if sparsity.is_sparse(found) else None,
    )
    with atomic(request.output / "README.md") as file:
        file.write(text)
