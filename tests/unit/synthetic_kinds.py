"""Records of studies of other kinds of models, for which no model ran: worse models make more mistakes."""

import numpy
import pandas
from synthetic_records import SKILL, Synthetic

from coppice.core import fingerprints, records
from coppice.stats import retrieval_metrics, text_metrics

COLORS, SHAPES = ("red", "blue", "green", "black"), ("circle", "square", "triangle", "star")
KIND_OF_DATA = {"captioner": "captions", "image-text": "questions", "code": "texts", "dual": None}
TUNED = "finetuned"


class SyntheticKinds(Synthetic):
    """A study of models whose fact `does` is a key of `KIND_OF_DATA`, or missing for a causal language model."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.prints = {}  # data set -> fingerprint of its rows

    def _prints(self, identity):
        found = super()._prints(identity)
        return found | {"datasets": found["datasets"] | self.prints}

    def _evaluation(self, folder, identity, skill):
        does = self.models[identity["model"]].get("does")
        if does is None:
            super()._evaluation(folder, identity, skill)
            return
        # the same rows are hard for every model, so that the comparison is a paired one
        hard = numpy.random.default_rng(5).uniform(size=self.items)
        right = (hard + self.random.normal(0, 0.15, self.items)) < 0.9 * skill
        measure = self._retrieval if does == "dual" else self._answers
        sections, samples = measure(right, skill, KIND_OF_DATA[does])
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        for name, rows in samples.items():
            rows.to_parquet(folder / f"samples/{name}.parquet", index=False)
        provenance = self._provenance(self._prints(identity))
        whole = identity | {
            **sections,
            "parameters": 1_000_000 if identity["stage"] == "dense" else 760_000,
            "adapter_parameters": 20_000 if identity["stage"] == TUNED else 0,
            "samples": {name: fingerprints.content_digest(folder / f"samples/{name}.parquet") for name in samples},
            "provenance": provenance,
        }
        records.write(folder / "evaluation_results.json", whole)
        records.write(folder / "ppl_results.json", identity | {"provenance": provenance})

    def _answers(self, right, skill, form):
        draw = numpy.random.default_rng(11)
        words = [draw.choice(COLORS, 2).tolist() + draw.choice(SHAPES, 2).tolist() for _ in right]
        truth = [f"a {a} {c} left of the {b} {d}" for a, b, c, d in words]
        wrong = [f"a {c} near a {b} {d}" for _, b, c, d in words]
        given = [good if yes else bad for yes, good, bad in zip(right, truth, wrong, strict=True)]
        references = [[one, one.replace("left of", "beside")] for one in truth]
        rows = _rows(form, len(right)) | {"answer": given, "references": references}
        sections = {}
        for metric in text_metrics.METRICS_OF_ROWS[form]:
            found = text_metrics.score(metric, given, references, form)
            sections[metric] = {form: {"value": found.value, "n": len(given), **found.facts}}
            rows[metric] = found.rows
        tokens = draw.integers(3, 20, len(right))
        losses = tokens * (0.4 + (1 - skill) + 0.3 * draw.normal(size=len(right)) ** 2)
        rows |= {"answer_nll": losses, "answer_tokens": tokens}
        total = int(tokens.sum())
        perplexity = float(numpy.exp(losses.sum() / total))
        sections["answer_ppl"] = {form: {"value": perplexity, "tokens": total, "n": len(given)}}
        return sections, {form: pandas.DataFrame(rows)}

    def _retrieval(self, right, skill, _):
        sections, samples, count = {}, {}, len(right)
        for direction in ("image_to_text", "text_to_image"):
            later = numpy.random.default_rng(13).integers(2, 30, count)
            ranks = numpy.where(right, 1, later)
            samples[f"pairs.{direction}"] = pandas.DataFrame(_rows("pairs", count) | {"rank": ranks})
            for depth in retrieval_metrics.DEPTHS:
                part = {"value": retrieval_metrics.recall(ranks, depth), "n": count, "candidates": count}
                sections[f"{direction}_r{depth}"] = {"pairs": part | {"chance": depth / count}}
        tops = {"top1": right.astype(float), "top5": numpy.maximum(right, later < 12).astype(float)}
        for place, (name, values) in enumerate(tops.items()):
            part = {"value": float(values.mean()), "n": count, "candidates": 16, "chance": (1 + 4 * place) / 16}
            sections[name] = {"classes": part}
        samples["classes"] = pandas.DataFrame(
            _rows("classes", count) | tops | {"label": "circle", "prediction": "star"}
        )
        return sections, samples


def mixed(results, items=120, configs=("best_acc", "best_ppl"), **kinds):
    """Return a study that is not built yet. kinds: model -> what it does, None for a causal language model."""
    facts = {"variant": "base", "base": None}
    models = {name: facts | {"family": name.lower(), "does": does} for name, does in kinds.items()}
    return SyntheticKinds(results, models, configs, items=items, windows=25)


def _rows(name, count):
    return {"doc_id": range(count), "doc_hash": [f"{name}-{row}" for row in range(count)]}


__all__ = ["SKILL", "SyntheticKinds", "mixed"]
