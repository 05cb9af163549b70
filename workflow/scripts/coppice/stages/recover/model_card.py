"""Write the model card of an adapter: what it was made from, how it was trained, and how to load it."""

from pathlib import Path

import jinja2

from coppice.core.records import atomic

TEMPLATE = Path(__file__).with_name("card.md.j2")


def write(output, identity, settings, outcome, source, weights):
    """Write `README.md` into the adapter's folder `output`.

    identity: {model, candidate or config}; outcome: facts about the training; source: the checkpoint (a
    models.Source); weights: its fingerprint.
    """
    card = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    text = card.render(
        model=identity["model"],
        name=identity.get("candidate") or identity["config"],
        lora=settings["lora"],
        settings=settings,
        outcome=outcome,
        source=source.path,
        literal=repr(source.path),  # as a Python literal, because the path may contain quotes
        weights=weights,
    )
    with atomic(output / "README.md") as file:
        file.write(text)
