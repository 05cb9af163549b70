"""Which settings can change results. A change of the others reruns nothing.

For every key, the schema's `reruns` names the stages that a change reruns; the function `reruns` reads it.
"""

from . import schema

# section -> keys that decide how work is done; they change results only by rounding and by the random draws of dropout
EXECUTION = {
    "models": ("device_map",),
    "finetune": (
        "micro_batch_size",
        "arrangement",
        "gradient_checkpointing",
        "sharding",
        "save_steps",
        "report_to",
    ),
    "evaluate": ("batch_size",),
}
# section -> keys that add outputs; they do not change the outputs that exist without them
EXTRA_OUTPUT = {"finetune": ("merge", "seeds")}

NOTHING, EVERYTHING = "nothing", "everything"
STAGES = ("data", "prune", "score", "select", "finetune", "evaluate", "compare", "report", "ablation")


def result_settings(section, values):
    """Return a section's `values` without the execution settings: those on which results depend."""
    return {key: value for key, value in values.items() if key not in EXECUTION[section]}


def execution_settings(section, values):
    """Return a section's execution settings, on which no result depends."""
    return {key: values[key] for key in EXECUTION[section]}


def narrowed(evaluate, texts):
    """Return the section `evaluate` for scoring candidates and arms.

    They are measured on `texts` under the first protocol only, without generated answers and cost. Unused protocols are
    removed, so that changing one reruns no scoring.
    """
    perplexity = evaluate["perplexity"]
    named = perplexity["protocol"]
    first = named if isinstance(named, str) else named[0]
    own = {name: protocol for name, protocol in perplexity["protocols"].items() if name == first}
    return evaluate | {
        "perplexity": perplexity | {"datasets": texts, "protocol": first, "protocols": own},
        "generation": {"prompts": []},
        "cost": {"enabled": False},
    }


def reruns(path):
    """Return the stages (a tuple) that rerun if the key at `path` changes. Stages that depend on them rerun too.

    Args:
        path: as `schema.key_paths` yields it. A key without `reruns` inherits that of the nearest enclosing section.
    """
    nodes = dict(schema.key_paths())
    ends = range(len(path), 0, -1)
    found = next((stages for end in ends if (stages := _reruns_at(nodes, path[:end]))), None)
    if found is None:
        raise KeyError(f"{schema.SCHEMA_FILE}: no `reruns` for {schema.dotted(path)}; add it to the key or its section")
    return tuple(found) if isinstance(found, list) else (found,)


def _reruns_at(nodes, path):
    """Return the schema's `reruns` at `path`, or None; the items of a list may override that of the list."""
    node = nodes.get(path) or nodes.get((*path[:-1], path[-1].removesuffix("[]"))) or {}
    entry = node.get("items", {}) if path[-1].endswith("[]") else {}
    return entry.get("reruns") or node.get("reruns")
