"""Which candidates of a study need scoring, on which data, and under which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.study import layout
from coppice.study.settings import own_sections, rerun_policy
from coppice.study.settings.criteria import scored_data, scored_texts
from coppice.study.settings.sections.evaluate import Evaluate

from .ranking import needs_scoring

if TYPE_CHECKING:
    from coppice.study.settings import Study


def settings(study: Study, model: str) -> Record:
    """Return the settings under which the candidates of a model are scored.

    They are those of the reports, reduced to the texts in `scored_texts` under the first perplexity protocol and to the
    other data sets by which some criterion chooses, without generated answers to prompts and without cost.
    """
    evaluate, criteria = study.evaluate_of(model), study.criteria_of(model).values()
    lists = scored_data(criteria, own_sections.data_of(evaluate))
    lists["perplexity"] = scored_texts(criteria, evaluate.perplexity.datasets)
    return rerun_policy.result_settings("evaluate", rerun_policy.narrowed(evaluate.model_dump(), lists))


def datasets(study: Study, model: str) -> list[str]:
    """Return the names of the data sets that the candidates of a model are scored on."""
    return own_sections.names_in(Evaluate.model_validate(settings(study, model)))


def needs_rows_of(study: Study, dataset: str) -> bool:
    """Return True if candidate scoring or an ablation needs selection rows of `dataset`."""
    if dataset in study.ablated_by():
        return True
    # of all models: if those that `only` leaves out did not count, `only` would read data sets again
    return any(dataset in datasets(study, model) for model in study.models if _is_scored(study, model))


def _is_scored(study: Study, model: str) -> bool:
    criteria = study.criteria_of(model)
    return any(needs_scoring(candidate, criteria) for candidate in study.candidates(model).values())


def records(study: Study, model: str) -> dict[str, tuple[str, str | None]]:
    """Return candidate -> (path of its pruning.json, path of its scores).

    The path of the scores is None if the candidate's row in the table has every metric that a criterion needs.
    """
    patterns = [layout.record(study.results, kind) for kind in ("candidate", "scores")]
    found = {}
    for name, candidate in study.candidates(model).items():
        pruning, scores = (pattern.format(model=model, candidate=name) for pattern in patterns)
        found[name] = (pruning, scores if needs_scoring(candidate, study.criteria_of(model)) else None)
    return found
