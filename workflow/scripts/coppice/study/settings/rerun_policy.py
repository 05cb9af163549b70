"""What a setting decides: which settings leave every number as it is, so that a change of theirs reruns nothing.

The schema says of every other key, under `reruns`, what is made anew where it changes; `reruns` reads that.
"""

from . import schema

# Section -> keys that say how the work is done, not what comes of it but for rounding and the draws of dropout
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
# Section -> keys that say what is written besides, or how often, of what is the same by itself
EXTRA_OUTPUT = {"finetune": ("merge", "seeds")}

NOTHING, EVERYTHING = "nothing", "everything"
STAGES = ("data", "prune", "score", "select", "finetune", "evaluate", "compare", "report", "ablation")


def result_settings(section, values):
    """`values` of a section without the keys that decide nothing: what a result is held against."""
    return {key: value for key, value in values.items() if key not in EXECUTION[section]}


def execution_settings(section, values):
    """The rest of them."""
    return {key: values[key] for key in EXECUTION[section]}


def narrowed(evaluate, texts):
    """The section `evaluate` by which candidates and arms are told apart; nothing is left in it of what is not used.

    They are measured on the texts `texts`, under the protocol that stands for a model, without answers and cost.
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
    """Stages in which results are made anew where the key at `path` (as of `schema.key_paths`) changes, a tuple.

    What follows them is made anew too. The key's own word counts, else that of the section around it.
    """
    nodes = dict(schema.key_paths())
    ends = range(len(path), 0, -1)
    found = next((said for end in ends if (said := _said(nodes, path[:end]))), None)
    if found is None:
        raise KeyError(f"{schema.SCHEMA_FILE}: nothing is said of what {schema.dotted(path)} reruns")
    return tuple(found) if isinstance(found, list) else (found,)


def _said(nodes, path):
    """What the schema says under `reruns` at `path`; entries of a list may have a word of their own."""
    node = nodes.get(path) or nodes.get((*path[:-1], path[-1].removesuffix("[]"))) or {}
    entry = node.get("items", {}) if path[-1].endswith("[]") else {}
    return entry.get("reruns") or node.get("reruns")
