"""The section `evaluate`."""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from .forms import ByKind, Named, Number, Text, Unique
from .section import Section, is_unset, section, setting

Bos = Literal["none", "once", "every-window"]
AnswerMetric = Literal["bleu4", "chrf", "cider", "exact_match", "anls", "token_f1", "edit_similarity"]


class Protocol(Section):
    """A protocol."""

    seq_len: int = setting(..., "Tokens per window; see bos_counts for BOS.", unit="tokens", ge=2, le=10_000_000)
    stride: int | None = setting(
        None,
        "Tokens from the start of one window to the start of the next. If it is less than seq_len, windows "
        "overlap, and each token is scored once, in the first window that contains it. Null means seq_len.",
        unit="tokens",
        ge=1,
        le=10_000_000,
    )
    join: str = setting("\n\n", "Text inserted between two rows of the data set.")
    role: Literal["report", "selection", "train"] = setting(
        "report", "Which part of the data set reports measure. Candidates are scored on another part."
    )
    bos: Bos | None = setting(
        None, "Where the BOS token is, as in perplexity.bos. Null means the value of perplexity.bos, or else none."
    )
    bos_counts: bool = setting(
        True,
        "Whether the BOS token of every window is one of its seq_len tokens and takes the place of a token of text.",
    )


class Perplexity(Section):
    """Perplexity on text."""

    datasets: Unique[str] = setting(
        ["wikitext2", "ptb"], "Names of the data sets; their report part is used.", reruns=["evaluate", "ablation"]
    )
    protocol: Annotated[str | Annotated[Unique[str], Field(min_length=1)], ByKind()] = setting(
        "gptq-2048",
        "How text is joined and cut into windows: `gptq-2048`, `llmpruner-128`, `shortened-llm-128`, `gptq-2048-v1`, "
        "`llmpruner-128-v1` or one of `protocols`. "
        "Perplexities under different protocols cannot be compared. If this is a list, selection, comparisons "
        "and reports use the first protocol.",
    )
    bos: Bos | None = setting(
        None,
        "Where the BOS token is: nowhere (none), before the whole text if the tokenizer itself begins texts with one "
        "(once), or at the beginning of every window (every-window). Null means the protocol's own.",
    )
    protocols: Named[Protocol] = setting({}, "Your own protocols, by name. Null drops a protocol.")


class TaskMetrics(Section):
    """The metric of each task that averages and reports use.

    A task that is not named here uses acc, else exact_match, else its first metric.
    """

    model_config = ConfigDict(extra="allow")
    OPEN: ClassVar = Annotated[Text, Field(description="Metric of this task.")]
    __pydantic_extra__: dict[str, Text]

    hellaswag: Text = setting("acc_norm", "Metric of HellaSwag.")
    arc_challenge: Text = setting("acc_norm", "Metric of ARC-Challenge.")
    openbookqa: Text = setting("acc_norm", "Metric of OpenBookQA.")


class ZeroShot(Section):
    """Zero-shot tasks of lm-eval."""

    tasks: Unique[str] = setting(
        ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
        "Task names as in lm-eval.",
    )
    metric: TaskMetrics = section(TaskMetrics)
    limit: int | None = setting(
        None, "Maximum number of items per task, for a quick look. Null means all.", ge=1, le=1_000_000_000
    )
    include_path: Text | None = setting(
        None,
        "Folder of your own task definitions (lm-eval's YAML), searched before lm-eval's own.",
        reruns=["data", "score", "evaluate", "ablation"],
    )
    num_fewshot: int | None = setting(
        None,
        "Number of solved examples before each item, taken from the train part of the task's data set. Null "
        "takes the number from the task's definition (0 for the seven default tasks).",
        ge=0,
        le=10_000,
    )
    on_merged_tokens: Literal["error", "drop", "score-whole"] = setting(
        "error",
        "What to do if the tokenizer merges the end of a prompt with the beginning of its answer. error stops if no "
        "token of the answer is left to score; otherwise the answer loses its first characters, as in lm-eval. drop "
        "leaves such items out, score-whole scores the merged token with the answer. The results count these items.",
    )
    chat_template: bool = setting(
        False,
        "Whether to prompt models with their tokenizer's chat template. Models without one get plain prompts. "
        "The results say which was used.",
    )


class Generation(Section):
    """Questions that each model answers. The study's report shows the answers side by side."""

    prompts: list[Text] = setting(
        [
            "Explain in two sentences why the sky is blue.",
            "Write a short note that thanks a neighbour for watering the plants.",
            "A train leaves at 9:40 and arrives at 12:05. How long does the journey take?",
        ],
        "The questions, asked in the model's prompt format. An empty list asks none.",
    )
    new_tokens: int = setting(
        48, "Maximum number of tokens of an answer. Decoding is greedy.", unit="tokens", ge=1, le=100_000
    )


class Programs(Section):
    """Running the programs that models write to rows with tests (prompt, test and canonical_solution, as HumanEval's).

    Each runs in a sandbox, which protects from mistakes and not from attacks; the log says what it lacks on the
    machine. Without it, programs are only compared with the canonical solution, as texts.
    """

    run: bool = setting(False, "Whether to run them, which gives pass@1.")
    samples: int = setting(1, "Programs for each row; more than 1 needs sample: true.", ge=1, le=10_000)
    k: Annotated[Unique[Annotated[int, Field(ge=1)]], Field(min_length=1)] = setting(
        [1], "pass@k of these k in the record, estimated without bias from the samples. No k exceeds samples."
    )
    timeout: Number = setting(10, "A program that runs longer fails.", unit="seconds", gt=0, le=86_400)
    memory: int = setting(1024, "Memory of a program.", unit="MiB", ge=64, le=1_000_000)


class Answers(Section):
    """Rows that each model answers by generation, measured against their references (all kinds but dual-encoder)."""

    datasets: Unique[str] = setting(
        [], "Names of the data sets; their report part is used.", reruns=["evaluate", "ablation"]
    )
    metrics: Annotated[Unique[AnswerMetric], Field(min_length=1)] | None = setting(
        None,
        "How answers are measured. Null decides by the rows: bleu4, chrf, cider and exact_match for captions; "
        "exact_match, anls and token_f1 for questions; exact_match, edit_similarity, bleu4 and chrf for completions "
        "and pairs. The perplexity of the references is measured in any case.",
    )
    beams: int = setting(1, "Beams of beam search; 1 is greedy decoding.", ge=1, le=1000)
    sample: bool = setting(False, "Whether to draw tokens at random, with the study's seed.")
    temperature: Number = setting(1.0, "Temperature of sampling.", gt=0, le=100)
    top_p: Number = setting(1.0, "Sampling draws from the most likely tokens that have this probability.", gt=0, le=1)
    new_tokens: int = setting(64, "Maximum number of tokens of an answer.", unit="tokens", ge=1, le=100_000)
    limit: int | None = setting(
        None, "Maximum number of rows per data set, for a quick look. Null means all.", ge=1, le=1_000_000_000
    )
    batch_size: int = setting(32, "Rows that are answered at a time.", unit="rows", ge=1, le=1_000_000)
    stop: Annotated[Unique[Text], Field(min_length=1)] | None = setting(
        None, "Texts at which an answer ends. Null means only the model's end token."
    )
    programs: Programs = section(Programs)


class Retrieval(Section):
    """Retrieval of images by captions and of captions by images (dual encoders)."""

    datasets: Unique[str] = setting(
        [],
        "Names of the data sets of images with captions; their report part is used.",
        reruns=["evaluate", "ablation"],
    )
    limit: int | None = setting(
        None, "Maximum number of images per data set, for a quick look. Null means all.", ge=2, le=1_000_000_000
    )


class Classification(Section):
    """Zero-shot classification of images by the names of their classes (dual encoders)."""

    datasets: Unique[str] = setting(
        [], "Names of the data sets of images with labels; their report part is used.", reruns=["evaluate", "ablation"]
    )
    templates: Annotated[Unique[Text], Field(min_length=1)] = setting(
        ["a photo of a {}."], "Texts in which {} becomes the name of a class. Their embeddings are averaged."
    )
    classes: Annotated[Text | Annotated[Unique[Text], Field(min_length=2)] | None, ByKind()] = setting(
        None, "The names of the classes: a list, or a file with one name per line. Null means the labels that occur."
    )
    limit: int | None = setting(
        None, "Maximum number of images per data set, for a quick look. Null means all.", ge=1, le=1_000_000_000
    )


class Cost(Section):
    """Sizes, measured at the end of each evaluation, and latencies, which one job for each model measures in turns."""

    enabled: bool = setting(True, "Whether sizes and latencies are measured.")
    batch_sizes: Annotated[Unique[Annotated[int, Field(ge=1)]], Field(min_length=1)] = setting(
        [1], "Batch sizes (sequences at a time); each is timed separately."
    )
    prompt_tokens: int = setting(128, "Tokens of the prompt (prefill).", unit="tokens", ge=1, le=10_000_000)
    new_tokens: int = setting(
        16, "Tokens generated after the prompt, one by one (decode).", unit="tokens", ge=1, le=100_000
    )


class Evaluate(Section):
    """How dense, pruned and fine-tuned models are evaluated, all with the same settings."""

    perplexity: Perplexity = section(Perplexity)
    zero_shot: ZeroShot = section(ZeroShot)
    engine: Literal["prefix-tree", "lm-eval"] = setting(
        "prefix-tree",
        "The engine that scores the tasks. prefix-tree computes the context that an item's choices share only "
        "once; lm-eval is the harness's own Hugging Face backend, to check the results.",
    )
    batch_size: int = setting(
        16,
        "Sequences that the lm-eval engine processes at a time.",
        reruns=["nothing"],
        unit="sequences",
        ge=1,
        le=1_000_000,
    )
    answers: Answers = section(Answers, exclude_if=is_unset)
    retrieval: Retrieval = section(Retrieval, exclude_if=is_unset)
    classification: Classification = section(Classification, exclude_if=is_unset)
    generation: Generation = section(Generation, reruns=["evaluate"])
    cost: Cost = section(Cost, reruns=["evaluate"])
