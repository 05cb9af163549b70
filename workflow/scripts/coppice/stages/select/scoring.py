"""Which candidates of a study need scoring, on which data, and under which settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.study import layout
from coppice.study.settings import rerun_policy
from coppice.study.settings.criteria import scored_texts

from .ranking import needs_scoring

if TYPE_CHECKING:
    from coppice.study.settings import Study


def settings(study: Study) -> Record:
    """Return the settings under which candidates are scored.

    They are those of the reports, reduced to the texts in `scored_texts` and the first perplexity protocol, without
    generated answers and cost.
    """
    texts = scored_texts(study.configs.values(), study.evaluate.perplexity.datasets)
    return rerun_policy.result_settings("evaluate", rerun_policy.narrowed(study.evaluate.model_dump(), texts))


def datasets(study: Study) -> list[str]:
    """Return the names of the datasets that candidates are scored on."""
    return list(dict.fromkeys([*settings(study)["perplexity"]["datasets"], *study.evaluate.zero_shot.tasks]))


def needs_rows_of(study: Study, dataset: str) -> bool:
    """Return True if candidate scoring or an ablation needs selection rows of `dataset`."""
    if dataset in study.ablated_by():
        return True
    scored = any(
        needs_scoring(candidate, study.configs)
        for model in study.active_models()
        for candidate in study.candidates(model).values()
    )
    return scored and dataset in datasets(study)


def records(study: Study, model: str) -> dict[str, tuple[str, str | None]]:
    """Return candidate -> (path of its pruning.json, path of its scores).

    The path of the scores is None if the candidate's row in the table has every metric that a criterion needs.
    """
    patterns = [layout.record(study.results, kind) for kind in ("candidate", "scores")]
    found = {}
    for name, candidate in study.candidates(model).items():
        pruning, scores = (pattern.format(model=model, candidate=name) for pattern in patterns)
        found[name] = (pruning, scores if needs_scoring(candidate, study.configs) else None)
    return found
