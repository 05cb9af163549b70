"""Whether memory and files of long runs stay flat: resident memory over the steps of a training and of an evaluation.

Each stage runs by the study's own code in a new process on a random miniature model; the mean of the second quarter of
its steps (the first one fills caches) is compared with that of the last:

    python benchmarks/endurance.py [--steps 2000] [--rows 4000] [--check]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import conclude

STAGES = ("training", "zero-shot", "perplexity")
GROWTH = 0.02  # of the memory in the second quarter
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 512,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--rows", type=int, default=4000, help="of the task and of the text")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--check", action="store_true", help=f"fail where memory grows by more than {GROWTH:.0%}")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        once(arguments, arguments.one[0], Path(arguments.one[1]))
        return 0
    results = {}
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, "--one", stage, folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            results[stage] = summed_up(Path(folder))
    return conclude(results, arguments, below, show, summary)


def once(arguments, stage, folder):
    """Run one stage in `folder`, with the resident memory after each of its steps in `memory.json`."""
    import psutil

    from coppice import logs

    logs.limit_threads(1)
    from coppice import finetuning, models
    from coppice.finetuning import progress

    process, memory = psutil.Process(), []

    def note(*arguments, **options):
        memory.append(process.memory_info().rss)

    model, sets = prepared(folder, arguments.rows)
    if stage == "training":
        progress.TrainingLog.on_step_end = note
        study = settings(finetune={"max_steps": arguments.steps, "batch_size": 4, "save_steps": 100, "eval_steps": 100})
        who, source = {"model": "M", "config": "c"}, models.Source(str(model))
        finetuning.finetune(who, source, {"alpaca": sets["alpaca"]}, study.finetune, "none", folder / "out")
    else:
        evaluate(stage, model, sets, folder / "out", note)
    (folder / "memory.json").write_text(json.dumps(memory))


def settings(**sections):
    """A study whose settings are those of the schema, but for `sections`."""
    from coppice import settings

    sections["finetune"] = {"data": {"val_size": 50}, "warmup_steps": 1} | sections.get("finetune", {})
    return settings.load({"models": {"M": {"base": "miniature/mistral"}}, "datasets": DATASETS} | sections)


DATASETS = {name: {"path": f"miniature/{name}"} for name in ("alpaca", "ptb", "wikitext2", "piqa")}


def evaluate(stage, model, sets, folder, note):
    """Evaluate on a long task or a long text; `note` is called after each batch."""
    from coppice import evaluation, logs, models

    advance = logs.ProgressLines.advance

    def noted(self, count=1):
        note()
        advance(self, count)

    logs.ProgressLines.advance = noted
    texts, tasks = (["ptb"], []) if stage == "perplexity" else ([], ["piqa"])
    study = settings(
        evaluate={"perplexity": {"datasets": texts}, "zero_shot": {"tasks": tasks}, "cost": {"enabled": False}},
        select={"configs": {"c": {"metric": "ppl.ptb" if texts else "piqa", "mode": "min" if texts else "max"}}},
    )
    who = {"model": "M", "config": "c", "stage": "dense"}
    evaluation.evaluate(who, models.Source(str(model)), study.evaluate, sets, folder)


def prepared(folder, rows):
    """(a random model with a word-level tokenizer, name -> dataset.json), with `rows` rows in all of the latter."""
    import random

    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    from coppice import data

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 512)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    MistralForCausalLM(MistralConfig(**SHAPE)).save_pretrained(folder / "model")
    chance = random.Random(0)

    def said(longest):
        return " ".join(f"w{chance.randrange(3, 512)}" for _ in range(chance.randrange(4, longest)))

    tables = {
        "alpaca": {"train": [{"instruction": said(30), "input": "", "output": said(60)} for _ in range(rows)]},
        "ptb": {"report": [{"text": said(80)} for _ in range(rows)]},
        "piqa": {"report": [{"goal": said(40), "sol1": said(30), "sol2": said(30), "label": 0} for _ in range(rows)]},
    }
    for name, roles in tables.items():
        data.write(name, roles, folder / name, splits={}, source={})
    return folder / "model", {name: folder / name / "dataset.json" for name in tables}


def summed_up(folder):
    """{steps, early and late: mean bytes in the second and the last quarter, log_bytes, checkpoint_bytes}."""
    memory = json.loads((folder / "memory.json").read_text())
    quarter = len(memory) // 4
    early, late = memory[quarter : 2 * quarter], memory[-quarter:]
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    logs = [path.stat().st_size for path in files if path.name in ("training_log.txt", "training_state.json")]
    return {
        "steps": len(memory),
        "early": sum(early) / quarter,
        "late": sum(late) / quarter,
        "log_bytes": sum(logs),
        "files": len(files),
    }


def below(name, result):
    """Where memory grew."""
    grown = result["late"] / result["early"] - 1
    return [f"{name}: memory grew by {grown:.1%}"] if grown > GROWTH else []


def show(name, result):
    """One line a stage."""
    early, late = result["early"] / 2**20, result["late"] / 2**20
    print(
        f"{name}: {result['steps']} steps, {early:.1f} MiB in the second quarter, {late:.1f} MiB in the last "
        f"({late - early:+.1f}); {result['files']} files are left, {result['log_bytes'] / 1000:.0f} kB of them logs"
    )


def summary(results, failures):
    return "memory grows" if failures else f"memory is flat in {', '.join(results)}"


if __name__ == "__main__":
    sys.exit(main())
