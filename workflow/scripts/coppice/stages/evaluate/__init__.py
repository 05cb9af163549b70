"""Evaluate one model by all metrics of its kind, with the same code for dense, pruned and finetuned.

Writes `evaluation_results.json`, `ppl_results.json` and `samples/{task}.parquet`. Each task and each text is a part,
which is stored as soon as it is finished (see `parts`). A killed evaluation continues with what is missing, an extended
one computes only what is new, and if every part exists, the model is not loaded.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.aliases import Record
from coppice.data.row_sources import RowSource
from coppice.models import adapters, chat_clock, cost, generating, sparsity
from coppice.models.kinds import Decoding
from coppice.stats import metrics, stored_samples
from coppice.study.settings.sections.evaluate import Evaluate

from . import classification, generation, guards, perplexity, programs, retrieval, row_answers, zero_shot
from .evaluation_request import EvaluationRequest
from .parts import Computed, Parts
from .perplexity import Protocol
from .subject import Subject

if TYPE_CHECKING:
    from coppice.models.kinds import LoadedModel

__all__ = ["EVALUATORS", "Evaluate", "EvaluationRequest", "average", "evaluate", "summary"]

logger = logging.getLogger("coppice.evaluation")


def evaluate(request: EvaluationRequest) -> None:
    """Evaluate a checkpoint, with or without an adapter, and write the records and samples."""
    clock, source, output, identity = records.Clock(), request.source, request.output, request.identity
    model_fingerprints = {
        "weights": fingerprints.weights(source.path),
        "adapter": fingerprints.weights(request.adapter) if request.adapter else None,
    }
    if request.adapter:
        adapters.check_origin(request.adapter, source.path)
    if request.dense and request.candidate:
        guards.check_pruned(source.path, model_fingerprints["weights"], request.candidate, request.dense)
    parts = Parts(output / ".parts", _common(source, model_fingerprints))
    job = _Evaluation(request, parts)
    record = job.run() | chat_clock.recorded(source)
    settings = request.settings.model_dump(exclude_unset=True) | {"purpose": request.purpose}
    provenance = clock.provenance(settings, request.seed, **model_fingerprints, datasets=job.used) | parts.run()
    record["samples"] = stored_samples.write_samples(output, job.samples)
    # evaluation_results.json comes last: whoever finds it also finds the files that belong to it.
    records.write(output / "ppl_results.json", identity | job.losses | {"provenance": provenance})
    records.write(output / "evaluation_results.json", identity | record | {"provenance": provenance})
    parts.discard_unused()
    logger.info("%s", summary(identity | record))


def average(tasks: Mapping[str, Record]) -> float | None:
    """Return the unweighted mean of the tasks' values, each under its own metric, or None if there is no task."""
    return math.fsum(result["value"] for result in tasks.values()) / len(tasks) if tasks else None


def summary(record: Record) -> str:
    """Return one line with the evaluated model and its measurements."""
    found = [f"mean accuracy {record['average_acc']:.4f}"] if record.get("average_acc") is not None else []
    if texts := ", ".join(f"{name} {result['value']:.2f}" for name, result in record.get("perplexity", {}).items()):
        found.append(f"perplexity {texts}")
    others = metrics.found_in(record, metrics.OF_DATA)
    found += [f"{metric.label} {metric.shown(metric.value(record))}" for metric in others if metric.reported]
    who = " ".join(str(record[key]) for key in ("model", "config", "candidate", "stage") if record.get(key))
    return f"{who}: {'; '.join(found) or 'no metric was asked for'}"


def _common(source: models.Source, model_fingerprints: Mapping[str, str | None]) -> Record:
    """Return the facts that decide the numbers of every part, for the keys of the parts."""
    versions = records.versions()
    return {
        **model_fingerprints,
        "tokenizer": fingerprints.tokenizer(source.path),
        "loading": {key: getattr(source, key) for key in ("dtype", "quantize", "trust_remote_code")} | source.given(),
        **chat_clock.recorded(source),
        **({"code": fingerprints.code(source.path)} if source.trust_remote_code else {}),
        "device": models.device_kind(),
        "versions": {name: version for name, version in versions.items() if name not in ("python", "coppice")},
    }


class _Evaluation:
    """One evaluation: computes or reads its parts and assembles the records.

    Attributes:
        losses: what `ppl_results.json` holds, the losses of each window.
        samples: task -> its samples.
        used: dataset -> fingerprint of the rows that were used.
    """

    def __init__(self, request: EvaluationRequest, parts: Parts) -> None:
        self.subject, self.parts, self.prompt = Subject(request.source, request.adapter), parts, request.prompt
        self.settings, self.datasets = request.settings, request.datasets
        self.purpose, self.seed = request.purpose, request.seed
        self.sizes: Record = {}
        self.losses: Record = {}
        self.samples: dict[str, list[Record]] = {}
        self.used: dict[str, str] = {}

    def run(self) -> Record:
        """Return the record, of all evaluators that apply to the kind of model."""
        self.sizes, _ = self.parts.part("sizes", "model", {"zeros": "counted"}, lambda: (self.subject.sizes(), None))
        record = {**self.sizes, "warnings": []}
        for name in models.kind_of(self.subject.source).evaluators:
            record = record | EVALUATORS[name](self)
        return record

    def perplexity(self) -> Record:
        """Return the perplexity of each text, under each protocol."""
        protocols = perplexity.protocols(self.settings.perplexity)
        first, *more = [self._texts(protocol, index) for index, protocol in enumerate(protocols)]
        named = dict(zip((protocol.name for protocol in protocols[1:]), more, strict=True))
        self.losses = {"perplexity": first, "perplexity_more": named}
        others = {name: _without_losses(texts) for name, texts in named.items()}
        return {"perplexity": _without_losses(first), "perplexity_more": others}

    def _texts(self, protocol: Protocol, index: int) -> dict[str, Record]:
        """Return text -> result with its losses by window and by document, under one protocol."""
        results = {}
        for name in self.settings.perplexity.datasets:
            facts = self._text_facts(name, protocol)
            # A further protocol may score other rows of the same dataset, so its entry names the protocol too.
            self.used[name if not index else f"{name} ({protocol.name})"] = facts["rows"]
            results[name], _ = self.parts.part(
                "perplexity",
                name,
                facts,
                lambda n=name, s=facts["split"]: self._text(self.subject.model, n, protocol, s),
            )
        return results

    def _text_facts(self, name: str, protocol: Protocol) -> Record:
        """Return what decides a text's losses."""
        rows = data.facts(self.datasets[name], protocol.role_of(name, self.purpose))
        return protocol.facts(name, self.purpose) | {"rows": rows["fingerprint"], "split": rows["split"]}

    def _text(self, model: LoadedModel, name: str, protocol: Protocol, split: str) -> Computed:
        rows = data.texts(self.datasets[name], protocol.role_of(name, self.purpose))
        result, losses = perplexity.measure(model, self.subject.tokenizer, rows, name, protocol, split=split)
        logger.info("perplexity on %s (%s): %.3f (%d tokens)", name, protocol.name, result["value"], result["tokens"])
        return result | losses, None

    def zero_shot(self) -> Record:
        """Return the accuracies of tasks and their mean, and the other results.

        Other results are those whose metric is not a mean over items, so that items cannot be paired by them.
        """
        choice = self.settings.zero_shot
        accuracies, others, chosen, warnings = {}, {}, choice.metric.model_dump(), {}
        for name in choice.tasks:
            facts, rows = self.parts.part("task", name, self._task_facts(name), lambda n=name: self._task(n))
            found, self.samples[name], is_accuracy = zero_shot.result(name, facts, rows, chosen.get(name))
            (accuracies if is_accuracy else others)[name] = found | {"engine": facts["engine"]}
            warnings[name] = facts["warnings"]
            logger.info("%s: %s %.4f over %d items", name, found["metric"], found["value"], found["n"])
        scores = {"zero_shot": accuracies, "other_tasks": others, "average_acc": average(accuracies)}
        return scores | {"warnings": list(dict.fromkeys(itertools.chain(*warnings.values())))}

    def _task_facts(self, name: str) -> Record:
        """Return what decides a task's scores. The metric is not part of it, because every metric is stored."""
        choice, engine = self.settings.zero_shot, self.settings.engine
        rows = data.facts(self.datasets[name], self.purpose)["fingerprint"]
        self.used[name] = rows
        facts = zero_shot.facts(name, choice.include_path) | {"rows": rows, "engine": engine}
        facts |= {"method": zero_shot.METHOD}
        chosen = ("limit", "num_fewshot", "chat_template", "on_merged_tokens")
        facts |= {key: getattr(choice, key) for key in chosen}
        if facts["shots"] or facts["num_fewshot"]:  # examples in prompts are drawn from the train rows with the seed
            facts |= {"train": data.fingerprint(self.datasets[name], "train"), "seed": self.seed}
        # The batch size changes the last digits of the harness's scores; the prefix tree does not use this setting.
        return facts | ({"batch_size": self.settings.batch_size} if engine == "lm-eval" else {})

    def _task(self, name: str) -> Computed:
        engine = self.settings.engine
        lm = self.subject.language_model(engine, self.settings.batch_size)
        facts, rows = zero_shot.measure(lm, name, self.datasets[name], self.purpose, self.settings.zero_shot, self.seed)
        warnings = [*lm.warnings, *facts["warnings"]]
        return facts | {"engine": self.subject.engine_of(engine), "warnings": warnings}, rows

    def generation(self) -> Record:
        """Return the model's answers to the questions under `generation`, asked in its prompt format."""
        wanted, subject = self.settings.generation, self.subject
        if not wanted.prompts:
            return {"generations": []}
        facts = wanted.model_dump() | {"form": self.prompt}

        def ask() -> Computed:
            options = wanted.prompts, self.prompt, wanted.new_tokens
            return {"answers": generation.answers(subject.model, subject.tokenizer, *options)}, None

        return {"generations": self.parts.part("generation", "prompts", facts, ask)[0]["answers"]}

    def answers(self) -> Record:
        """Return section -> data set -> result for the answers to the rows of data sets, with samples for each."""
        wanted, found = self.settings.answers, {}
        decoding = row_answers.decoding_of(wanted, self.seed)
        for name in wanted.datasets:
            facts = self._answer_facts(name, decoding)
            measured, rows = self.parts.part("answers", name, facts, lambda n=name: self._answer(n, decoding))
            results, self.samples[name] = row_answers.scored(rows, measured["row_kind"], wanted.metrics)
            if measured["row_kind"] == programs.ROWS and wanted.programs.run:
                results |= self._run_programs(name, facts)
            how = {"decoding": facts["decoding"]}
            decoded = {key: one if key == "answer_ppl" else one | how for key, one in results.items()}
            _collect(found, name, decoded)
        return found

    def _answer_facts(self, name: str, decoding: Decoding) -> Record:
        """Return what decides the answers to the rows of a data set. The metrics are computed from the answers."""
        asked = self._row_facts(name) | {"limit": self.settings.answers.limit, "form": self.prompt}
        count = self.settings.answers.programs.samples
        asked |= {"count": count} if count > 1 else {}
        own, ids = generating.settings_of(self.subject.source.path)
        how = row_answers.facts_of(decoding) | ({"checkpoint": own} if own else {})
        return asked | {"decoding": how, "token_ids": ids, "protocol": row_answers.PROTOCOL}

    def _answer(self, name: str, decoding: Decoding) -> Computed:
        subject, wanted = self.subject, self.settings.answers
        rows = self._rows(name, models.kind_of(subject.source).row_kinds)
        count = wanted.programs.samples
        return row_answers.measure(subject.model, subject.reader, rows, decoding, wanted.limit, count)

    def _run_programs(self, name: str, facts: Record) -> Record:
        """Return {pass_at_1} of the programs among the samples of a data set, which get its column and the verdicts."""
        wanted, samples = self.settings.answers.programs, self.samples[name]

        def run() -> Computed:
            contents = data.load(self.datasets[name], self.purpose).to_list()[: len(samples)]
            return programs.run(samples, contents, wanted)

        how, rows = self.parts.part("programs", name, facts | programs.facts_of(wanted), run)
        verdicts = [list(row["verdicts"]) for row in rows]
        result, values = programs.scored(verdicts, wanted.k)
        self.samples[name] = [
            row | {"pass_at_1": value, "verdicts": said}
            for row, value, said in zip(samples, values, verdicts, strict=True)
        ]
        return {"pass_at_1": result | how}

    def retrieval(self) -> Record:
        """Return section -> data set -> recall in both directions, with samples for each."""
        limit, found = self.settings.retrieval.limit, {}
        for name in self.settings.retrieval.datasets:
            facts = self._row_facts(name) | {"limit": limit, "protocol": retrieval.PROTOCOL}

            def ask(name: str = name) -> Computed:
                source = self._rows(name, retrieval.ROWS)
                return retrieval.measure(self.subject.model, self.subject.reader, source, limit)

            sections, samples = retrieval.results(*self.parts.part("retrieval", name, facts, ask))
            self.samples |= {f"{name}.{direction}": rows for direction, rows in samples.items()}
            _collect(found, name, sections)
        return found

    def classification(self) -> Record:
        """Return section -> data set -> accuracy of zero-shot classification, with samples for each."""
        wanted, found = self.settings.classification, {}
        for name in wanted.datasets:
            facts = self._row_facts(name) | wanted.model_dump() | {"protocol": classification.PROTOCOL}

            def ask(name: str = name) -> Computed:
                source = self._rows(name, classification.ROWS)
                return classification.measure(self.subject.model, self.subject.reader, source, wanted)

            measured = self.parts.part("classification", name, facts, ask)
            sections, self.samples[name] = classification.results(*measured, wanted)
            _collect(found, name, sections)
        return found

    def _row_facts(self, name: str) -> Record:
        """Return which rows of a data set are used."""
        self.used[name] = rows = data.facts(self.datasets[name], self.purpose)["fingerprint"]
        return {"rows": rows, "role": self.purpose}

    def _rows(self, name: str, accepted: Sequence[str]) -> RowSource:
        return RowSource(name, self.datasets[name], self.purpose, self.prompt, self.subject.reader, accepted)

    def merge(self) -> Record:
        """Return how far merging the adapter moves the outputs. It changes the weights, so only cost comes later."""
        subject = self.subject
        if subject.adapter is None:
            return {"merge_drift": None, "masked_merge": None}
        drift, _ = self.parts.part("merge", "adapter", self._merging(), lambda: (subject.merge(), None))
        by_perplexity = "perplexity" in models.kind_of(subject.source).evaluators
        masked = (
            by_perplexity
            and subject.keeps_zeros
            and sparsity.is_sparse(self.sizes["sparsity"])
            and "unsupported" not in drift
        )
        return {"merge_drift": drift, "masked_merge": self._masked_merge() if masked else None}

    def _merging(self) -> dict[str, str]:
        """Return the fact that decides what is merged, besides the adapter: its training may give up zeros."""
        return {} if self.subject.adapter is None or self.subject.keeps_zeros else {"keep_sparsity": "off"}

    def _masked_merge(self) -> Record:
        """Return {perplexity: text -> value} of the adapter merged into sparse weights whose zeros were kept.

        All other numbers are measured with the adapter beside the weights, where it also acts on pruned ones.
        """
        protocol, found = perplexity.protocols(self.settings.perplexity)[0], {}
        for name in self.settings.perplexity.datasets:
            facts = self._text_facts(name, protocol)

            def measure(name: str = name, split: str = facts["split"]) -> tuple[Record, None]:
                return self._text(self.subject.merged_model()[0], name, protocol, split)

            found[name] = self.parts.part("masked perplexity", name, facts, measure)[0]["value"]
        return {"perplexity": found}

    def cost(self) -> Record:
        """Return what the merged model costs to run."""
        subject, wanted = self.subject, self.settings.cost
        if not wanted.enabled:
            return {"cost": None}
        measured = self.parts.part(
            "cost",
            "model",
            wanted.model_dump() | self._merging() | {"protocol": cost.PROTOCOL},
            lambda: (cost.measure(*subject.merged_model(), wanted), None),
        )
        return {"cost": measured[0]}


# name, as in `ModelKind.evaluators` -> what returns its fields of the record
EVALUATORS = {
    "perplexity": _Evaluation.perplexity,
    "zero_shot": _Evaluation.zero_shot,
    "generation": _Evaluation.generation,
    "answers": _Evaluation.answers,
    "retrieval": _Evaluation.retrieval,
    "classification": _Evaluation.classification,
    "merge": _Evaluation.merge,
    "cost": _Evaluation.cost,
}


def _collect(found: dict[str, dict[str, Record]], name: str, sections: Mapping[str, Record]) -> None:
    """Add the results of a data set to those of others: section -> data set -> result."""
    for section, result in sections.items():
        found.setdefault(section, {})[name] = result
        logger.info("%s: %s %.4f over %d rows", name, section, result["value"], result["n"])


def _without_losses(texts: Mapping[str, Record]) -> dict[str, Record]:
    losses = ("window_losses", "document_losses")
    return {name: {k: v for k, v in result.items() if k not in losses} for name, result in texts.items()}
