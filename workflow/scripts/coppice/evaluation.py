"""Evaluate one model: perplexity on texts and zero-shot tasks, by the same code for dense, pruned and finetuned.

Writes `evaluation_results.json`, `ppl_results.json` and `samples/{task}.parquet`.
"""

import logging
import math
from pathlib import Path

from . import data, fingerprints, models, perplexity, records, zero_shot
from .errors import CoppiceError

logger = logging.getLogger("coppice.evaluation")


def evaluate(identity, source, settings, datasets, output, adapter=None, purpose="report", seed=0):
    """Evaluate the checkpoint `source` (a models.Source), with the LoRA `adapter` (a folder) on it where given.

    identity: {model, config or candidate, stage}; settings: {perplexity: {datasets, protocol, bos}, zero_shot:
    {tasks, metric, limit}, engine, batch_size}; datasets: name -> path of its dataset.json; output: the folder that
    takes the records and samples. `purpose` is "report" or "selection", which decides the rows that are used.
    """
    clock, output = records.Clock(), Path(output)
    model = models.load(source, adapter)
    tokenizer = models.load_tokenizer(source.path, source.trust_remote_code)
    models.check_vocabulary(model, tokenizer, source.path)
    texts, losses, used = _perplexities(model, tokenizer, settings["perplexity"], datasets, purpose)
    tasks, samples, seen = _zero_shot(model, tokenizer, settings, datasets, purpose)
    prints = {
        "weights": fingerprints.weights(source.path),
        "adapter": fingerprints.weights(adapter) if adapter else None,
        "datasets": used | seen,
    }
    provenance = clock.provenance(settings | {"purpose": purpose}, seed, **prints)
    record = identity | {
        "perplexity": texts,
        "zero_shot": tasks,
        "average_acc": average(tasks),
        "parameters": _base_parameters(model),
        "adapter_parameters": models.parameters(model) - _base_parameters(model),
        "provenance": provenance,
    }
    for name, rows in samples.items():
        _write_samples(output / "samples" / f"{name}.parquet", rows)
    records.write(
        output / "ppl_results.json", identity | {"perplexity": _with(texts, losses), "provenance": provenance}
    )
    records.write(output / "evaluation_results.json", record)
    logger.info("%s", summary(record))


def average(tasks):
    """Unweighted mean of the tasks' values (each under its own metric); None where there is no task."""
    return math.fsum(result["value"] for result in tasks.values()) / len(tasks) if tasks else None


def summary(record):
    """One line: who was evaluated and what came out."""
    texts = ", ".join(f"{name} {result['value']:.2f}" for name, result in record["perplexity"].items())
    accuracy = f"mean accuracy {record['average_acc']:.4f}" if record["average_acc"] is not None else "no tasks"
    who = " ".join(str(record[key]) for key in ("model", "config", "candidate", "stage") if record.get(key))
    return f"{who}: {accuracy}; perplexity {texts or 'not measured'}"


def _base_parameters(model):
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)


def _perplexities(model, tokenizer, settings, datasets, purpose):
    """Results, per-window losses and dataset fingerprints of the configured texts."""
    protocol = perplexity.PROTOCOLS[settings["protocol"]]
    results, losses, prints = {}, {}, {}
    for name in settings["datasets"]:
        role = protocol.role_of(name, purpose)
        facts = data.facts(datasets[name], role)
        rows = data.texts(datasets[name], role)
        results[name], losses[name] = perplexity.measure(
            model, tokenizer, rows, name, protocol, settings.get("bos", False), facts["split"]
        )
        if not math.isfinite(results[name]["value"]):
            raise CoppiceError(f"the perplexity on {name} is {results[name]['value']}: the model is broken")
        logger.info("perplexity on %s: %.3f (%d tokens)", name, results[name]["value"], results[name]["tokens"])
        prints[name] = facts["fingerprint"]
    return results, losses, prints


def _zero_shot(model, tokenizer, settings, datasets, purpose):
    """Results, samples and dataset fingerprints of the configured tasks."""
    results, samples, prints = {}, {}, {}
    choice = settings["zero_shot"]
    if not choice["tasks"]:
        return results, samples, prints
    lm = zero_shot.language_model(model, tokenizer, settings["engine"], settings["batch_size"])
    for name in choice["tasks"]:
        metric = choice["metric"].get(name, "acc")
        results[name], samples[name] = zero_shot.measure(lm, name, datasets[name], purpose, metric, choice["limit"])
        results[name]["engine"] = settings["engine"]
        if any(math.isnan(score) for row in samples[name] for score in row.get("loglikelihoods", ())):
            raise CoppiceError(f"task {name}: the model gives NaN as a log-likelihood: it is broken")
        logger.info("%s: %s %.4f over %d items", name, metric, results[name]["value"], results[name]["n"])
        prints[name] = data.facts(datasets[name], purpose)["fingerprint"]
    return results, samples, prints


def _with(texts, losses):
    return {name: result | {"window_losses": losses[name]} for name, result in texts.items()}


def _write_samples(path, rows):
    import pandas

    with records.atomic(path, "wb") as file:
        pandas.DataFrame(rows).to_parquet(file, index=False)
