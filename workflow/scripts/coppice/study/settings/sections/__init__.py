"""The sections of the configuration, as Pydantic models: a file a section.

They are the only list of its keys. Checks, defaults, the reference page, the editor's schema and the options of
`coppice finetune` come from them. The defaults are those of the real study; config/config.yaml sets what the miniature
study needs to differ, and config/full.yaml resets it.
"""

from .ablation import Ablation
from .candidates import Candidates
from .data_sets import Dataset, Miniature
from .evaluate import Evaluate
from .finetune import Finetune
from .forms import Day, Named, Seed, Text, Unique
from .models import Model
from .per_job import Gpus, ResourcesPerJob, ThreadsPerJob
from .section import Section, section, setting
from .select import Select


class Only(Section):
    """Restricts a run to part of the study."""

    models: Unique[str] | None = setting(None, "Names of the models to run. Null means all.")
    configs: Unique[str] | None = setting(None, "Names of the criteria (select.configs) to run. Null means all.")


class Config(Section):
    """A prune-then-finetune study."""

    results: Text = setting("results", "Folder of all results, relative to the working directory.", reruns=["nothing"])
    resources: Text = setting(
        "resources",
        "Folder of the models and data sets that are fetched or built once.",
        reruns=["prune", "evaluate", "ablation"],
    )
    seed: Seed = setting(42, "Seed of all random draws.", reruns=["everything"])
    chat_date: Day | None = setting(
        None,
        "The day that chat templates read as today, in quotes, such as '2026-01-31'. Null means the day on which the "
        "study began, which `{results}/chat_date.json` keeps.",
        reruns=["finetune", "evaluate", "score", "ablation"],
    )
    data_root: str | None = setting(
        None, "Folder that replaces `{data_root}` at the start of a data set's path.", reruns=["data"]
    )
    only: Only = section(Only, reruns=["report"])
    models: Named[Model] = setting(
        ..., "The models of the study, by the names that paths and reports use. Null drops a model.", reruns=["data"]
    )
    candidates: Candidates = section(Candidates, reruns=["prune"])
    select: Select = section(Select, reruns=["select"])
    finetune: Finetune = section(Finetune, reruns=["finetune", "ablation"])
    evaluate: Evaluate = section(Evaluate, reruns=["score", "evaluate", "ablation"])
    ablations: Named[Ablation] = setting(
        {},
        "Ablations of the fine-tuning, by name. The arms of an ablation train one checkpoint at an equal "
        "budget and are compared. Each ablation has exactly one of arms, grid and staged. Null drops an "
        "ablation.",
        reruns=["ablation"],
    )
    datasets: Named[Dataset] = setting(
        {},
        "The location of each data set, by the name that other keys use. wikitext2, ptb, alpaca and the seven "
        "tasks need no entry: Coppice then uses their official data sets. Null drops an entry.",
        reruns=["data"],
    )
    miniature: Miniature = section(Miniature, reruns=["data"])
    resources_per_job: ResourcesPerJob = section(ResourcesPerJob, reruns=["nothing"])
    gpus: Gpus = section(Gpus, reruns=["nothing"])
    threads_per_job: ThreadsPerJob = section(ThreadsPerJob, reruns=["nothing"])
