"""Records of a study for which no model ran: random answers and losses with the effects that a real study shows."""

import copy
import hashlib
import shutil
from pathlib import Path

import numpy
import pandas

from coppice.core import fingerprints, records
from coppice.stages.compare import comparison

TASKS = {"boolq": 2, "piqa": 2, "hellaswag": 4, "winogrande": 2, "arc_easy": 4, "arc_challenge": 4, "openbookqa": 4}
TEXTS = ("wikitext2", "ptb")
SIX = {
    f"{family}{suffix}": {"variant": variant, "family": family.lower(), "base": f"miniature/{family.lower()}"}
    for family in ("Llama", "Qwen", "Mistral")
    for suffix, variant in (("", "base"), ("-Instruct", "instruct"))
}
SKILL = {"dense": 1.0, "pruned": 0.35, "finetuned": 0.75}


class Synthetic:
    """A study under `results`: `build()` writes all records of `models` (name -> facts) and `configs`."""

    def __init__(self, results, models=None, configs=("best_acc", "best_ppl"), items=120, windows=30, seed=0):
        self.results, self.models = Path(results), dict(models or SIX)
        self.configs, self.items, self.windows, self.seed = tuple(configs), items, windows, seed
        self.random = numpy.random.default_rng(seed)
        self.difficulty = {task: self.random.uniform(size=items) for task in TASKS}

    @property
    def pairs(self):
        return [(model, config) for model in self.models for config in self.configs]

    def build(self, distinct=None):
        """Write all records; with `distinct`, later models are copies of the first so many under other names."""
        names = list(self.models)
        for place, model in enumerate(names):
            if distinct and place >= distinct:
                self._copy(names[place % distinct], model)
            else:
                self._model(model)
        self._candidates()
        return self

    def folder(self, stage, model, config=None):
        """Return the folder of a stage's records, as the workflow lays them out."""
        if stage == "dense":
            return self.results / "dense_evaluation" / model
        tuned = config if stage in ("pruned", "selected") else f"{config}_finetuned"
        names = {"selected": "for_finetuning", "trained": "finetuned"}
        return self.results / names.get(stage, f"{stage}_evaluation") / model / tuned

    def _model(self, model):
        self._evaluation(self.folder("dense", model), {"model": model, "stage": "dense"}, 1.0)
        for place, config in enumerate(self.configs):
            offset = 0.08 * place
            for stage in ("pruned", "finetuned"):
                identity = {"model": model, "config": config, "stage": stage}
                self._evaluation(self.folder(stage, model, config), identity, SKILL[stage] - offset)
            self._selection(model, config, place)
            self._training(model, config)
            self.compare(model, config)

    def compare(self, model, config):
        """Write the comparison with the function of a real study."""
        stages = {stage: self.folder(stage, model, config) for stage in SKILL}
        tuned = stages["finetuned"]
        comparison.compare(
            {"model": model, "config": config},
            stages,
            self.folder("selected", model, config) / "selection_info.json",
            self.folder("trained", model, config) / "finetuning_config.json",
            {"record": tuned / "comparison.json", "report": tuned / "comparison_report.txt"},
        )

    def _evaluation(self, folder, identity, skill):
        tasks = {}
        for task, choices in TASKS.items():
            # The same items are hard for every model, so that the comparison is a paired one.
            chance = 1 / choices
            edge = chance + (1 - chance) * 0.75 * max(skill, 0)
            correct = (self.difficulty[task] + self.random.normal(0, 0.15, self.items)) < edge
            tasks[task] = self._samples(folder, task, correct, choices)
        texts, losses = {}, {}
        for place, text in enumerate(TEXTS):
            texts[text], losses[text] = self._perplexity(2.4 + 0.3 * place + 0.9 * (1 - skill), documents=not place)
        provenance = self._provenance(self._prints(identity))
        evaluation = identity | {
            "perplexity": texts,
            "zero_shot": tasks,
            "average_acc": float(numpy.mean([task["value"] for task in tasks.values()])),
            "parameters": 1_000_000 if identity["stage"] == "dense" else 760_000,
            "adapter_parameters": 20_000 if identity["stage"] == "finetuned" else 0,
            "samples": {task: fingerprints.content_digest(folder / f"samples/{task}.parquet") for task in TASKS},
            "provenance": provenance,
        }
        records.write(folder / "evaluation_results.json", evaluation)
        with_losses = {text: texts[text] | losses[text] for text in TEXTS}
        records.write(folder / "ppl_results.json", identity | {"perplexity": with_losses, "provenance": provenance})

    def _prints(self, identity):
        candidate = "" if identity["stage"] == "dense" else identity["config"]
        adapter = _digest(identity, "adapter") if identity["stage"] == "finetuned" else None
        return {
            "weights": _digest(identity["model"], candidate),
            "adapter": adapter,
            "datasets": {name: _digest(name) for name in (*TEXTS, *TASKS)},
        }

    def _samples(self, folder, task, correct, choices):
        rows = pandas.DataFrame(
            {
                "doc_id": range(self.items),
                "doc_hash": [f"{task}-{i}" for i in range(self.items)],
                "correct": correct.astype(float),
                "prediction": [str(i % choices if right else (i + 1) % choices) for i, right in enumerate(correct)],
                "target": [str(i % choices) for i in range(self.items)],
            }
        )
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "samples" / f"{task}.parquet", index=False)
        mean = float(correct.mean())
        error = (mean * (1 - mean) / (self.items - 1)) ** 0.5
        metric = "acc_norm" if task in ("hellaswag", "arc_challenge", "openbookqa") else "acc"
        return {
            "metric": metric,
            "value": mean,
            "stderr": error,
            "n": self.items,
            "version": 1.0,
            "engine": "lm-eval",
            metric: mean,
        }

    def _perplexity(self, level, documents):
        """Return the result and the losses of a text, each window of which is a document if it has `documents`."""
        windows = level + 0.2 * numpy.random.default_rng(7).normal(size=self.windows)
        windows = windows + self.random.normal(0, 0.02, self.windows)
        nll = float(windows.mean())
        protocol = {
            "name": "gptq-2048",
            "split": "test",
            "join": "\n\n",
            "seq_len": 2048,
            "stride": 2048,
            "bos": "once",
            "bos_counts": True,
            "version": 2,
        }
        result = {"value": float(numpy.exp(nll)), "nll_per_token": nll, "tokens": 2047 * self.windows}
        losses = [{"nll_per_token": float(loss), "tokens": 2047} for loss in windows]
        result |= {"windows": self.windows, "documents": self.windows if documents else 1, "protocol": protocol}
        return result, {"window_losses": losses, "document_losses": losses if documents else None}

    def _provenance(self, prints, settings=None):
        return {
            "settings": settings,
            "seed": 42,
            "fingerprints": prints,
            "versions": {"python": "3.11.9", "coppice": "0.1.0", "torch": "2.13.0"},
            "device": "cpu (x86_64)",
            "threads": 1,
            "started": "2025-03-01T10:00:00Z",
            "seconds": float(self.random.uniform(20, 60)),
            "peak_memory_bytes": {"host": int(self.random.uniform(1, 2) * 2**30)},
        }

    def _selection(self, model, config, place):
        metric = "ppl.wikitext2" if config.endswith("ppl") else "average_acc"
        mode = "min" if metric.startswith("ppl") else "max"
        pruning = {"method": "width", "ratio": 0.25, "importance": "taylor", "parts": ["mlp", "attention"]}
        candidate = f"candidate-{place}"
        record = {
            "model": model,
            "config": config,
            "criterion": {"metric": metric, "mode": mode, "words": f"{mode} {metric}", "split": "selection"},
            "candidate": candidate,
            "value": 0.42,
            "metrics": {"average_acc": 0.42, "ppl.wikitext2": 24.0},
            "metrics_from": "scored here",
            "parameters": 760_000,
            "runner_up": {"candidate": "candidate-3", "value": 0.41, "margin": 0.01},
            "candidates_considered": [candidate, "candidate-3"],
            "source_path": f"results/candidates/{model}/{candidate}",
            "weights_fingerprint": _digest(model, config),
            "pruning": pruning,
            "provenance": {"seed": 42, "versions": {"coppice": "0.1.0"}},
        }
        records.write(self.folder("selected", model, config) / "selection_info.json", record)

    def _training(self, model, config):
        steps = list(range(10, 130, 10))
        history = [{"step": step, "loss": 3.0 * step**-0.15, "learning_rate": 1e-4, "epoch": 1.0} for step in steps]
        history += [{"step": step, "eval_loss": 3.1 * step**-0.14, "epoch": 1.0} for step in (40, 80, 120)]
        identity = {"model": model, "config": config}
        outcome = {
            "trainable_parameters": 20_000,
            "all_parameters": 780_000,
            "trainable_percent": 2.56,
            "steps": 120,
            "tokens_seen": 150_000,
            "tokens_per_second": 3000.0,
            "seconds": float(self.random.uniform(40, 80)),
            "train_loss": 1.9,
            "validation_loss": 1.6,
            "best_step": 120,
            "first_validation_loss": 1.9,
            "train_rows": 1800,
            "validation_rows": 200,
            "skipped_rows": 0,
            "peak_memory_bytes": {"host": int(self.random.uniform(1, 2) * 2**30)},
            "warnings": [],
            "trained_fingerprint": self._prints(identity | {"stage": "finetuned"})["adapter"],
        }
        lora = {"preset": None, "r": 8, "alpha": 16, "dropout": 0.05, "target_modules": "all-linear"}
        settings = {"lora": lora, "learning_rate": 1e-4, "batch_size": 64, "epochs": 2, "prompt": "alpaca"}
        prints = {"weights": _digest(model, config), "dataset": _digest("alpaca")}
        folder = self.folder("trained", model, config)
        records.write(folder / "training_state.json", identity | {"history": history, **outcome})
        provenance = self._provenance(prints, settings)
        records.write(
            folder / "finetuning_config.json", identity | {"settings": settings, **outcome, "provenance": provenance}
        )

    def _candidates(self):
        rows = []
        for model in self.models:
            for place in range(5):
                row = {"model": model, "candidate": f"candidate-{place}", "parameters": 700_000 + 40_000 * place}
                accuracy = 0.4 + 0.02 * place + self.random.normal(0, 0.02)
                row |= {"average_acc": accuracy, "ppl.wikitext2": 30 - 3 * place + self.random.normal(0, 3)}
                chosen = self.configs[place] if place < len(self.configs) else ""
                rows.append(row | {"chosen_as": chosen})
        pandas.DataFrame(rows).to_csv(self.results / "candidates.tsv", sep="\t", index=False)

    def _copy(self, source, model):
        """Copy all records of `source` to the name `model`, which is fast enough for hundreds of models."""
        pairs = [("dense", None)]
        pairs += [(stage, c) for c in self.configs for stage in ("pruned", "finetuned", "selected", "trained")]
        for stage, config in pairs:
            old, new = self.folder(stage, source, config), self.folder(stage, model, config)
            shutil.copytree(old, new)
            for path in new.glob("*.json"):
                record = copy.deepcopy(records.read(path))
                records.write(path, record | {"model": model})


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()
