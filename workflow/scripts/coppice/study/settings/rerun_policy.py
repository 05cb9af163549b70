"""Which settings can change results. A change of the others reruns nothing.

For every key, the `reruns` of its field name the stages that a change reruns; `keys.reruns` reads it.
"""

from collections.abc import Mapping

from coppice.core.aliases import Record

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
# Parts of the section `evaluate` that are left out of it if they list no data sets
OF_OTHER_KINDS = ("answers", "retrieval", "classification")


def result_settings(section: str, values: Record) -> Record:
    """Return a section's `values` without the execution settings: those on which results depend."""
    return {key: value for key, value in values.items() if key not in EXECUTION[section]}


def execution_settings(section: str, values: Record) -> Record:
    """Return a section's execution settings, on which no result depends."""
    return {key: values[key] for key in EXECUTION[section]}


def narrowed(evaluate: Record, lists: Mapping[str, list[str]]) -> Record:
    """Return the section `evaluate` for scoring candidates and arms.

    They are measured on some of the data sets (on texts under the first protocol only), without answers to the prompts
    and without cost. Unused protocols and sections without data are removed, so that changing one reruns no scoring.

    Args:
        evaluate: the section, dumped.
        lists: section -> its texts, or its data sets, to measure. Tasks stay as they are.
    """
    perplexity = evaluate["perplexity"]
    named = perplexity["protocol"]
    first = named if isinstance(named, str) else named[0]
    own = {name: protocol for name, protocol in perplexity["protocols"].items() if name == first}
    others = {name: evaluate[name] | {"datasets": lists[name]} for name in OF_OTHER_KINDS if lists.get(name)}
    return {key: value for key, value in evaluate.items() if key not in OF_OTHER_KINDS} | {
        "perplexity": perplexity | {"datasets": lists["perplexity"], "protocol": first, "protocols": own},
        "generation": {"prompts": []},
        "cost": {"enabled": False},
        **others,
    }
