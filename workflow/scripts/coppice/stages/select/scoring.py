"""Which candidates of a study are scored here, on which data, and how."""

from coppice.study import layout
from coppice.study.settings import rerun_policy
from coppice.study.settings.criteria import scored_texts

from .ranking import needs_scoring


def settings(study):
    """How candidates are scored: as reports are, but on `scored_texts` alone, under the protocol that stands for a
    model, without answers and cost.
    """
    chosen = scored_texts(study.configs.values(), study.evaluate["perplexity"]["datasets"])
    return rerun_policy.result_settings("evaluate", rerun_policy.narrowed(study.evaluate, chosen))


def datasets(study):
    """Names of the data sets that candidates are scored on."""
    return list(dict.fromkeys([*settings(study)["perplexity"]["datasets"], *study.evaluate["zero_shot"]["tasks"]]))


def needs_rows_of(study, dataset):
    """Whether selection rows of `dataset` are asked for: by the scoring of candidates, or by an ablation."""
    if dataset in study.ablated_by():
        return True
    scored = any(
        needs_scoring(candidate, study.configs)
        for model in study.active_models()
        for candidate in study.candidates(model).values()
    )
    return scored and dataset in datasets(study)


def records(study, model):
    """candidate -> (its pruning.json, its scores or None where its table row has all that is asked for)."""
    patterns = [layout.record(study.results, kind) for kind in ("candidate", "scores")]
    found = {}
    for name, candidate in study.candidates(model).items():
        pruning, scores = (pattern.format(model=model, candidate=name) for pattern in patterns)
        found[name] = (pruning, scores if needs_scoring(candidate, study.configs) else None)
    return found
