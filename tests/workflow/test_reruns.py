"""A changed setting reruns exactly what the key's `reruns` says, and nothing that does not depend on it."""

import copy

import pytest
import yaml
from snakemake.utils import update_config

from coppice.study.settings import keys
from coppice.study.settings.checking import dotted

from .changes import Finished

pytestmark = pytest.mark.guard

# A study in which every key has an effect: a model from the hub and miniatures of three kinds, each kind of criterion,
# a mixture, a custom protocol, each kind of ablation
STUDY = """
models:
  Hub: {base: org/model, revision: abc, family: llama, parameters: 1000000}
  Mini: {base: miniature/llama-instruct, variant: instruct, prompt: chat}
  Seq:
    base: miniature/t5
    finetune: {data: {dataset: captions, validation: null, train_on_inputs: false}, arrangement: null}
  Dual:
    base: miniature/clip
    finetune:
      data: {dataset: pairs, validation: null, train_on_inputs: false}
      arrangement: null
      lora: {towers: {text: {r: 4}}}
candidates:
  prune:
    - {method: depth, ratio: 0.34}
    - {method: width, ratio: 0.25, importance: taylor}
    - {method: width, ratio: 0.5, importance: magnitude, parts: [mlp], ranking: uniform, name: mine}
    - {method: unstructured, ratio: 0.5, importance: wanda, name: sparse}
select:
  configs:
    best_acc: {metric: average_acc, mode: max}
    best_ppl: {metric: ppl.wikitext2, mode: min, where: {parameters: {max: 6.0e+9}}}
    knee: {pareto: knee, metrics: {average_acc: max, ppl.wikitext2: min}}
    best_rows: {metric: [exact_match.captions, text_to_image_r1.pairs, piqa]}
    best_top: {metric: [top1.classes]}
finetune:
  data: {dataset: {alpaca: 3, chats: 1}, validation: mine}
data_root: data
evaluate:
  answers: {datasets: [captions], sample: true, programs: {samples: 4}}
  retrieval: {datasets: [pairs]}
  classification: {datasets: [classes]}
  perplexity: {protocol: [own, gptq-2048], protocols: {own: {seq_len: 128, stride: 64, join: " "}}}
  zero_shot: {tasks: [piqa, arc_easy, arc_challenge, hellaswag, openbookqa], metric: {piqa: acc}, chat_template: true}
datasets:
  wikitext2: {path: miniature/wikitext2}
  alpaca: {path: miniature/alpaca}
  chats: {path: org/chats, name: default, revision: one, columns: {messages: said}}
  mine: {path: "{data_root}/mine.json", format: json}
  piqa: {path: miniature/piqa}
  arc_challenge: {path: miniature/arc_challenge}
  hellaswag: {path: miniature/hellaswag}
  openbookqa: {path: miniature/openbookqa}
  captions: {path: miniature/captions}
  pairs: {path: org/pairs}
  classes: {path: miniature/picture-classes}
ablations:
  listed:
    start: {model: Mini, config: best_acc}
    arms: [light, {name: mine, r: 4, alpha: 8}, {name: whole, train: all}]
    budget: {tokens: 1.0e+6}
    metrics: {tasks: [piqa], perplexity: [wikitext2]}
  raced:
    start: {model: Hub}
    grid: {r: [4, 8], learning_rate: [1.0e-4, 3.0e-4]}
    budget: {tokens: 1.0e+6}
    seeds: [1, 2]
    racing: {rungs: 1, eta: 2}
  rates:
    start: {model: Mini}
    grid: {learning_rate: [1.0e-4, 3.0e-4]}
    base: {warmup_steps: 10}
    budget: {max_steps: 60}
  pictures:
    start: {model: Dual, config: best_rows}
    arms: [light, full]
    budget: {max_steps: 200}
  captions:
    start: {model: Seq, config: best_rows}
    arms: [light, full]
    budget: {max_steps: 200}
  staged:
    start: {checkpoint: ./checkpoint, dtype: float32}
    staged: [{name: rank, vary: {r: [4, 16]}, with: {alpha: 2r}}, {name: alpha, vary: {alpha: [r, 2r]}}]
"""
CHOSEN = {
    "best_acc": "depth-0.34",
    "best_ppl": "width-0.25-taylor",
    "knee": "mine",
    "best_rows": "mine",
    "best_top": "mine",
}

STAGE = {
    "fetch": "data",
    "build": "data",
    "check": "prune",
    "prune": "prune",
    "import": "prune",
    "score": "score",
    "select": "select",
    "release": "select",
    "finetune": "finetune",
    "evaluate": "evaluate",
    "measure": "evaluate",
    "compare": "compare",
    "summarize": "report",
    "write": "report",
    "ablation": "ablation",
}


def nested(path, value):
    for part in reversed(path):
        value = {part: value}
    return value


def of_point(**keys):
    """Return the grid with other keys at its named point."""
    grid = copy.deepcopy(yaml.safe_load(STUDY)["candidates"]["prune"])
    grid[2] |= keys
    return grid


def of_sparse(**keys):
    grid = copy.deepcopy(yaml.safe_load(STUDY)["candidates"]["prune"])
    grid[3] |= keys
    return grid


def of_arm(**keys):
    """Return the arms of an ablation with other keys in the named one."""
    arms = copy.deepcopy(yaml.safe_load(STUDY)["ablations"]["listed"]["arms"])
    arms[1] |= keys
    return arms


def of_stage(**keys):
    stages = copy.deepcopy(yaml.safe_load(STUDY)["ablations"]["staged"]["staged"])
    stages[0] |= keys
    return stages


ARM = {
    "name": "another",
    "train": "all",
    "preset": "full",
    "scheme": "balanced",
    "r": 2,
    "alpha": "4r",
    "dropout": 0.2,
    "target_modules": "mlp",
    "bias": "all",
    "use_rslora": True,
    "use_dora": True,
    "init": "olora",
    "learning_rate": 5.0e-4,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "batch_size": 8,
    "warmup_steps": 3,
}

# key -> its new value in the study above; for a key with a name or an index in it, the mapping that holds the new
# value
VALUES = {
    "results": "elsewhere",
    "resources": "elsewhere",
    "seed": 7,
    "data_root": "other",
    "chat_date": "2020-02-02",
    "only.models": ["Hub"],
    "only.configs": ["best_ppl"],
    "candidates.table": "table.tsv",
    "candidates.per_job": "all",
    "candidates.keep": "all",
    "candidates.calibration.dataset": "ptb",
    "candidates.calibration.samples": 64,
    "candidates.calibration.length": 256,
    "candidates.calibration.windows": "within-rows",
    "candidates.prune": [{"method": "depth", "ratio": 0.34}, {"method": "depth", "ratio": 0.5}, *of_point()[1:]],
    "select.split": "report",
    "finetune.data.dataset": "alpaca",
    "finetune.data.dataset.<name>": {"alpaca": 2},
    "finetune.data.val_size": 30,
    "finetune.data.validation": None,
    "finetune.data.cutoff_len": 128,
    "finetune.data.train_on_inputs": True,
    "finetune.lora.preset": "full",
    "finetune.lora.r": 24,
    "finetune.lora.alpha": 3,
    "finetune.lora.dropout": 0.2,
    "finetune.lora.target_modules": "mlp",
    "finetune.lora.bias": "all",
    "finetune.lora.use_rslora": True,
    "finetune.lora.use_dora": True,
    "finetune.lora.init": "olora",
    "finetune.epochs": 3,
    "finetune.max_steps": 50,
    "finetune.learning_rate": 5.0e-4,
    "finetune.schedule": "cosine",
    "finetune.weight_decay": 0.1,
    "finetune.batch_size": 32,
    "finetune.micro_batch_size": 2,
    "finetune.arrangement": "sorted",
    "finetune.gradient_checkpointing": True,
    "finetune.sharding": True,
    "finetune.early_stopping": 3,
    "finetune.warmup_steps": 5,
    "finetune.eval_steps": 50,
    "finetune.save_steps": 50,
    "finetune.report_to": ["tensorboard"],
    "finetune.merge": True,
    "finetune.keep_sparsity": "off",
    "finetune.seeds": [42, 43],
    "evaluate.perplexity.datasets": ["wikitext2"],
    "evaluate.perplexity.protocol": "gptq-2048",
    "evaluate.perplexity.bos": "every-window",
    "evaluate.perplexity.protocols.<name>.seq_len": {"own": {"seq_len": 64}},
    "evaluate.perplexity.protocols.<name>.stride": {"own": {"stride": 32}},
    "evaluate.perplexity.protocols.<name>.join": {"own": {"join": "  "}},
    "evaluate.perplexity.protocols.<name>.role": {"own": {"role": "selection"}},
    "evaluate.perplexity.protocols.<name>.bos": {"own": {"bos": "every-window"}},
    "evaluate.perplexity.protocols.<name>.bos_counts": {"own": {"bos_counts": False}},
    "evaluate.zero_shot.tasks": ["piqa", "arc_easy", "arc_challenge", "hellaswag"],
    "evaluate.zero_shot.metric.hellaswag": "acc",
    "evaluate.zero_shot.metric.arc_challenge": "acc",
    "evaluate.zero_shot.metric.openbookqa": "acc",
    "evaluate.zero_shot.metric.<name>": {"piqa": "acc_norm"},
    "evaluate.zero_shot.limit": 10,
    "evaluate.zero_shot.include_path": "tasks",
    "evaluate.zero_shot.num_fewshot": 2,
    "evaluate.zero_shot.chat_template": False,
    "evaluate.zero_shot.on_merged_tokens": "drop",
    "evaluate.answers.datasets": ["captions", "classes"],
    "evaluate.answers.metrics": ["exact_match"],
    "evaluate.answers.beams": 3,
    "evaluate.answers.temperature": 0.5,
    "evaluate.answers.top_p": 0.5,
    "evaluate.answers.new_tokens": 5,
    "evaluate.answers.limit": 5,
    "evaluate.answers.batch_size": 3,
    "evaluate.answers.stop": ["."],
    "evaluate.answers.programs.run": True,
    "evaluate.answers.programs.samples": 5,
    "evaluate.answers.programs.k": [1, 2],
    "evaluate.answers.programs.timeout": 20,
    "evaluate.answers.programs.memory": 2048,
    "evaluate.retrieval.datasets": ["pairs", "classes"],
    "evaluate.retrieval.limit": 5,
    "evaluate.classification.datasets": ["classes", "captions"],
    "evaluate.classification.templates": ["{}"],
    "evaluate.classification.classes": ["disk", "ring"],
    "evaluate.classification.limit": 5,
    "evaluate.engine": "lm-eval",
    "evaluate.batch_size": 3,
    "evaluate.generation.prompts": ["Why?"],
    "evaluate.generation.new_tokens": 5,
    "evaluate.cost.enabled": False,
    "evaluate.cost.batch_sizes": [2],
    "evaluate.cost.prompt_tokens": 5,
    "evaluate.cost.new_tokens": 5,
    "miniature.corpus": "wikitext2",
    "miniature.steps": 50,
    "miniature.context": 128,
    "gpus.share": True,
    "gpus.skip_busy": True,
}
VALUES |= {f"threads_per_job.{stage}": 3 for stage in ("finetune", "evaluate", "prune", "build")}
VALUES |= {
    f"resources_per_job.{stage}.{key}": value
    for stage in ("finetune", "evaluate", "prune")
    for key, value in {
        "gpu": 2,
        "gpu_mem_mb": 9000,
        "gpu_model": "a100",
        "mem_mb": 9000,
        "disk_mb": 9000,
        "runtime": 90,
    }.items()
}
POINT = {
    "method": of_sparse(method="width", importance="taylor"),
    "ratio": of_point(ratio=0.4),
    "tower": of_point(tower="text"),
    "importance": of_point(importance="activation"),
    "parts": of_point(parts=["attention"]),
    "ranking": of_point(ranking="global"),
    "pattern": of_sparse(pattern="2:4"),
    "keep_blocks": of_point(keep_blocks={"first": 1, "last": 1}),
    "keep_blocks.first": of_point(keep_blocks={"first": 1}),
    "keep_blocks.last": of_point(keep_blocks={"last": 1}),
    "steps": of_point(steps=2),
    "consecutive": [{"method": "depth", "ratio": 0.34, "consecutive": True, "name": "depth-0.34"}, *of_point()[1:]],
    "name": of_point(name="other"),
}
VALUES |= {f"candidates.prune[].{key}": value for key, value in POINT.items()}
MODEL = {
    "base": ("Hub", "org/other"),
    "variant": ("Hub", "instruct"),
    "family": ("Hub", "qwen"),
    "prompt": ("Hub", "none"),
    "revision": ("Hub", "def"),
    "dtype": ("Hub", "float16"),
    "quantize": ("Hub", "8bit"),
    "trust_remote_code": ("Hub", True),
    "device_map": ("Hub", "auto"),
    "context_length": ("Hub", 128),
    "eos_token": ("Hub", "</s>"),
    "parameters": ("Hub", 2000000),
    "prune": ("Hub", of_point(ratio=0.4)),
    "kind": ("Hub", "image-text"),
}
VALUES |= {f"models.<name>.{key}": {name: {key: value}} for key, (name, value) in MODEL.items()}
VALUES |= {f"models.<name>.prune[].{key}": {"Hub": {"prune": value}} for key, value in POINT.items()}
KNEE = {"average_acc": "max", "ppl.wikitext2": "min"}
CONFIG = {
    "metric": {"best_acc": {"metric": "piqa"}},
    "mode": {"best_acc": {"mode": "min"}},
    "pareto": {"best_acc": {"metric": None, "mode": None, "pareto": "knee", "metrics": KNEE}},
    "metrics": {"knee": {"metrics": {"average_acc": None, "piqa": "max"}}},
    "metrics.<name>": {"knee": {"metrics": {"average_acc": "min"}}},
    "where": {"best_acc": {"where": {"parameters": {"max": 1.0e9}}}},
    "where.<name>.min": {"best_ppl": {"where": {"parameters": {"min": 1}}}},
    "where.<name>.max": {"best_ppl": {"where": {"parameters": {"max": 7.0e9}}}},
}
VALUES |= {f"select.configs.<name>.{key}": value for key, value in CONFIG.items()}
DATASET = {
    "path": {"chats": {"path": "org/others"}},
    "name": {"chats": {"name": "another"}},
    "revision": {"chats": {"revision": "two"}},
    "image_root": {"pairs": {"image_root": "data"}},
    "format": {"mine": {"format": "csv"}},
    "columns.<name>": {"chats": {"columns": {"messages": "told"}}},
    "splits.train": {"chats": {"splits": {"train": "all"}}},
    "splits.selection": {"chats": {"splits": {"selection": "dev"}}},
    "splits.report": {"chats": {"splits": {"report": "dev"}}},
}
VALUES |= {f"datasets.<name>.{key}": value for key, value in DATASET.items()}
ABLATION = {
    "start.model": {"listed": {"start": {"model": "Hub"}}},
    "start.config": {"listed": {"start": {"config": "best_ppl"}}},
    "start.checkpoint": {"staged": {"start": {"checkpoint": "./another"}}},
    "start.prompt": {"staged": {"start": {"prompt": "none"}}},
    "start.dtype": {"staged": {"start": {"dtype": "bfloat16"}}},
    "start.trust_remote_code": {"staged": {"start": {"trust_remote_code": True}}},
    "start.context_length": {"staged": {"start": {"context_length": 128}}},
    "start.eos_token": {"staged": {"start": {"eos_token": "</s>"}}},
    "arms": {"listed": {"arms": ["light", of_arm()[1]]}},
    "grid": {"raced": {"grid": {"dropout": [0.0, 0.1]}}},
    "grid.<name>": {"raced": {"grid": {"r": [4, 16]}}},
    "staged": {"staged": {"staged": [*of_stage(), {"name": "more", "vary": {"dropout": [0.0, 0.2]}}]}},
    "staged[].name": {"staged": {"staged": of_stage(name="other")}},
    "staged[].vary.<name>": {"staged": {"staged": of_stage(vary={"r": [4, 8]})}},
    "staged[].with.<name>": {"staged": {"staged": of_stage(**{"with": {"alpha": "r"}})}},
    "data.dataset": {"listed": {"data": {"dataset": "alpaca"}}},
    "data.dataset.<name>": {"listed": {"data": {"dataset": {"alpaca": 1}}}},
    "data.val_size": {"listed": {"data": {"val_size": 30}}},
    "data.validation": {"listed": {"data": {"validation": None}}},
    "data.cutoff_len": {"listed": {"data": {"cutoff_len": 128}}},
    "data.train_on_inputs": {"listed": {"data": {"train_on_inputs": True}}},
    "budget.max_steps": {"rates": {"budget": {"max_steps": 70}}},
    "budget.tokens": {"listed": {"budget": {"tokens": 2.0e6}}},
    "budget.flops": {"staged": {"budget": {"flops": 1.0e18}}},
    "base": {"listed": {"base": "full"}},
    "seeds": {"raced": {"seeds": [1, 2, 3]}},
    "eval_steps": {"listed": {"eval_steps": 7}},
    "choose_by.metric": {"listed": {"choose_by": {"metric": "piqa"}}},
    "choose_by.mode": {"listed": {"choose_by": {"mode": "max"}}},
    "metrics.tasks": {"listed": {"metrics": {"tasks": ["arc_easy"]}}},
    "metrics.perplexity": {"listed": {"metrics": {"perplexity": ["ptb"]}}},
    "metrics.answers": {"captions": {"metrics": {"answers": []}}},
    "metrics.retrieval": {"pictures": {"metrics": {"retrieval": []}}},
    "metrics.classification": {"pictures": {"metrics": {"classification": []}}},
    "metrics.limit": {"listed": {"metrics": {"limit": 5}}},
    "reference": {"listed": {"reference": "mine"}},
    "racing": {"raced": {"racing": None}},
    "racing.rungs": {"raced": {"racing": {"rungs": 2}}},
    "racing.eta": {"raced": {"racing": {"eta": 3}}},
}
ABLATION |= {f"base.{key}": {"rates": {"base": {key: value}}} for key, value in ARM.items()}
ABLATION |= {f"arms[].{key}": {"listed": {"arms": of_arm(**{key: value})}} for key, value in ARM.items()}
ABLATION["arms[].train"] = {"listed": {"arms": ["light", {"name": "mine", "train": "all", "learning_rate": 1.0e-5}]}}
TOWERS = {
    "": {"vision": "frozen"},
    ".r": {"text": {"r": 2}},
    ".alpha": {"text": {"r": 4, "alpha": 2}},
    ".learning_rate": {"text": {"r": 4, "learning_rate": 0.5}},
    ".target_modules": {"text": {"r": 4, "target_modules": "mlp"}},
}
for towers_key, towers in TOWERS.items():
    ABLATION[f"base.towers.<name>{towers_key}"] = {"pictures": {"base": {"towers": towers}}}
    ABLATION[f"arms[].towers.<name>{towers_key}"] = {"pictures": {"arms": ["light", {"towers": towers}]}}
ABLATION["base.name"] = {"rates": {"base": {"name": "other", "r": 2}}}  # `name` alone has no effect in `base`
ABLATION["base.learning_rate"] = {"listed": {"base": {"learning_rate": 5.0e-4}}}
VALUES |= {f"ablations.<name>.{key}": value for key, value in ABLATION.items()}


# Keys whose values only some kinds of model take, set for one of them
OF_A_MODEL = {
    f"finetune.lora.towers.<name>{key}": {"Dual": {"finetune": {"lora": {"towers": towers}}}}
    for key, towers in TOWERS.items()
} | {
    "candidates.prune[].tower": {"Seq": {"prune": of_point(tower="decoder")}},
    "evaluate.answers.sample": {"Seq": {"evaluate": {"answers": {"sample": False, "programs": {"samples": 1}}}}},
    "finetune.best_by": {"Seq": {"finetune": {"best_by": "bleu4"}}},
}
OBJECTIVE = {
    "ce": {"ce": 0},
    "kl": {"kl": 0.5},
    "temperature": {"temperature": 2},
    "divergence": {"divergence": "reverse"},
    "beta": {"divergence": "js", "beta": 0.1},
    "teacher": {"teacher": "Seq"},
}
OF_A_MODEL |= {
    f"finetune.objective.{key}": {"Seq": {"finetune": {"objective": {"kl": 1} | values}}}
    for key, values in OBJECTIVE.items()
}
VALUES |= OF_A_MODEL
# The keys of a model's own sections are those of the study; `test_mixed_kinds` changes some of them
OWN_SECTIONS = tuple(f"models.<name>.{section}" for section in ("calibration", "finetune", "evaluate"))


# words that `reruns` has in place of a list of stages
STAGES_OF_WORD = {keys.NOTHING: set(), keys.EVERYTHING: {*keys.STAGES} - {"ablation"}}


# Until a config has chosen again, its link jobs stand for the trainings and evaluations that they wait for
WAITING = {"link_training": "finetune", "link_pruned": "evaluate", "link_finetuned": "evaluate"}


def stages(rules):
    return {WAITING.get(rule) or STAGE[rule.partition("_")[0]] for rule in rules}


def change(key):
    """Return the change of the configuration that a key's entry in `VALUES` describes."""
    if key in OF_A_MODEL:
        # with all models, in their order: Snakemake puts those that a change names before the others
        return {"models": {name: OF_A_MODEL[key].get(name, {}) for name in yaml.safe_load(STUDY)["models"]}}
    path = key.split("<name>")[0].split("[]")[0].strip(".").split(".")
    return nested(path, VALUES[key])


ADDED = change("candidates.prune")  # one more grid point


def prepared(folder):
    """Write the study above to `folder`, with all files that it needs from outside, and return the folder."""
    (folder / "config/config.yaml").write_text(STUDY)
    for checkpoint in ("checkpoint", "another"):
        (folder / checkpoint).mkdir()
        (folder / checkpoint / "config.json").write_text("{}")
    for place in ("data", "other"):
        (folder / place).mkdir()
        (folder / place / "mine.json").write_text("{}")
    (folder / "tasks").mkdir()
    (folder / "tasks/own.yaml").write_text("task: own_task")
    # with a value for each criterion, so that nothing needs to be scored
    metrics = ("acc", "ppl", "exact_match.captions", "text_to_image_r1.pairs", "top1.classes")
    values = "\t".join(["0.5", "9", "0.5", "0.5", "0.5"])
    rows = "".join(f"{model}\tdepth-0.34\t./checkpoint\t{values}\n" for model in ("Hub", "Mini", "Seq", "Dual"))
    (folder / "table.tsv").write_text("\t".join(["model", "candidate", "path", *metrics]) + "\n" + rows)
    return folder


@pytest.fixture(scope="module")
def finished(new_checkout):
    return Finished(prepared(new_checkout("finished").folder), CHOSEN)


def test_changes_every_key():
    leaves = {dotted(key.path) for key in keys.every_key() if not key.is_section}
    assert {leaf for leaf in leaves if not leaf.startswith(OWN_SECTIONS)} <= set(VALUES)


def test_a_changed_setting_reruns_what_its_key_says(finished):
    """Changes one key at a time.

    The jobs that rerun because of the change itself belong to the stages that the key's `reruns` names, and each of
    these stages does rerun.
    """
    paths = {dotted(key.path): key.path for key in keys.every_key()}
    wrong = {}
    for key, found in zip(VALUES, finished.each(map(change, VALUES)), strict=True):
        declared = keys.reruns(paths[key])
        first, all_of_them = stages(rule for rule, own in found.items() if True in own), stages(found)
        expected = STAGES_OF_WORD.get(declared[0], {*declared})
        as_declared = expected <= all_of_them if declared[0] == keys.EVERYTHING else first <= expected <= all_of_them
        if not as_declared:
            wrong[key] = f"reruns first {sorted(first)}, then {sorted(all_of_them)}; its key says {declared}"
    assert not wrong


def test_the_seed_is_a_parameter_of_every_rule_that_draws_random_numbers(finished):
    """A new seed also reruns the stages before, so a rule that lost its own seed would go unnoticed."""
    drawing = {"prune_candidate", "score_candidate", "select_best", "finetune_lora", "compare_stages"}
    evaluating = {"evaluate_dense", "evaluate_pruned", "evaluate_finetuned"}
    assert drawing | evaluating <= finished.changed_parameters({"seed": 7})


def test_settings_that_cannot_change_results_rerun_nothing(finished):
    harmless = {}
    for path in (key.path for key in keys.every_key()):
        key = dotted(path)
        if key in VALUES and key != "results" and keys.reruns(path) == (keys.NOTHING,):
            update_config(harmless, change(key))
    assert {"finetune", "evaluate", "threads_per_job", "resources_per_job", "gpus", "models"} <= set(harmless)
    assert finished.reruns(harmless) == {}


def test_an_added_grid_point_reruns_no_other_point(finished):
    assert finished.added(ADDED) == {"prune_candidate": 4, "score_candidate": 4}  # one of each model
    assert not {"fetch_config", "prune_candidate", "score_candidate"} & set(finished.reruns(ADDED))
