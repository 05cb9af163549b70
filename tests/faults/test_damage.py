"""Files damaged behind Snakemake's back, with their time stamps kept: a rerun repairs them or names them."""

import os
import re
import shutil
from pathlib import Path

import pytest
from disturbance import EVERY_STAGE

from coppice.core import mirror
from tests.study.checkout import STUDY
from tests.study.outcome import differences, numbers

pytestmark = pytest.mark.slow
PRUNED = "results/pruned_evaluation/Mistral/best_acc"
TUNED = "results/finetuned/Mistral/best_{}_finetuned"
EVALUATED = "results/finetuned_evaluation/Mistral/best_{}_finetuned"


def change(path, how):
    """Replace the bytes of the file `path` with `how(bytes)` and keep its time stamps."""
    stat = path.stat()
    path.write_bytes(how(path.read_bytes()))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def garbled(content):
    return b"\x00\xff{[" * 8


def test_repairs_damaged_files_that_it_can_make_again(study_copy, finished):
    """Damages weights, checkpoints, parts of evaluations, and the small files that runs leave for each other."""
    folder = study_copy.folder
    tuned = Path(mirror.origin_of(folder / TUNED.format("acc") / "finetuning_config.json")).parent
    evaluated = Path(mirror.origin_of(folder / EVALUATED.format("acc") / "evaluation_results.json")).parent
    chosen = (folder / "results/for_finetuning/Mistral/best_acc/model.safetensors").resolve()
    change(chosen, flipped)
    (newest,) = tuned.glob("checkpoint-4")
    change(newest / "optimizer.pt", truncated)
    for part in sorted((evaluated / ".parts").iterdir())[::2]:
        change(part, flipped)
    for path in folder.glob("logs/*/.*.lock"):
        change(path, garbled)
    for path in (folder / "results/.status").rglob("*.json"):
        change(path, truncated)
    (tuned / "finetuning_config.json").unlink()
    (evaluated / "evaluation_results.json").unlink()
    study_copy.run("--cores", "2", *EVERY_STAGE, config=STUDY)
    assert differences(finished.numbers, numbers(folder)) == []


def test_names_other_damaged_files_and_a_remedy_that_works(study_copy, finished):
    """Each damaged file stops one job, and the remedies in the messages repair the study."""
    folder = study_copy.folder
    damaged = {
        f"{PRUNED}/ppl_results.json": truncated,
        f"{EVALUATED.format('ppl')}/samples/piqa.parquet": flipped,
        f"{TUNED.format('ppl')}/adapter_model.safetensors": flipped,
        "resources/miniature/arc_easy/report.parquet": flipped,
    }
    for path, how in damaged.items():
        change(folder / path, how)
    shutil.rmtree(folder / "results/dense_evaluation")
    shutil.rmtree(folder / "results/ablation")
    (folder / EVALUATED.format("acc") / "comparison.json").unlink()
    (folder / EVALUATED.format("ppl") / "comparison.json").unlink()
    for _ in range(len(damaged) + 1):
        done = study_copy.snakemake("--cores", "2", "--keep-going", *EVERY_STAGE, config=STUDY)
        if done.returncode == 0:
            break
        to_delete = remedies(done.stdout)
        assert to_delete and "Traceback" not in done.stdout, done.stdout[-6000:]
        for path in to_delete:
            (folder / path).unlink()
    assert done.returncode == 0, done.stdout[-6000:]
    assert differences(finished.numbers, numbers(folder)) == []


def remedies(text):
    """Return the files that the messages tell the user to delete."""
    return {match[1] for match in re.finditer(r"[Dd]elete (\S+?\.json)\b", text)} | {
        match[1] for match in re.finditer(r"(\S+\.json): .*[;.] [Dd]elete it and run snakemake again", text)
    }
