"""The section `finetune`."""

from typing import Annotated, Literal

from pydantic import Field

from .forms import ByKind, Named, Number, Seed, Text, Unique
from .section import Section, is_unset, section, setting

Preset = Literal["light", "standard", "full", "aggressive", "captioner"]
Init = Literal["default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loftq", "orthogonal"]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
Bias = Literal["none", "all", "lora_only"]
Tracker = Literal[
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
Mixture = Annotated[str | Named[Annotated[Number, Field(description="Weight in the mixture.", gt=0)]], ByKind()]


class TrainingData(Section):
    """Fine-tuning examples."""

    dataset: Mixture = setting(
        "alpaca",
        "Name of a data set, or a mixture of names with weights (`{alpaca: 3, notes: 1}`). A mixture uses as "
        "many rows as its weights allow without repeating a row. The columns decide what rows are: "
        "instructions (instruction, input, output), chats (messages), completions (prompt, completion), gaps to fill "
        "in (prefix, middle, suffix) or plain text (text).",
    )
    val_size: Number = setting(
        2000,
        "Number of rows held out from training for the validation loss; below 1, the share of rows.",
        ge=0,
        le=1_000_000_000,
    )
    validation: str | None = setting(
        None, "A data set whose train rows give the validation loss. If it is set, val_size is ignored."
    )
    cutoff_len: int = setting(
        256, "Maximum tokens per example; longer examples are cut.", unit="tokens", ge=8, le=10_000_000
    )
    train_on_inputs: bool = setting(False, "Whether the loss includes the prompt's tokens.")


class TowerLora(Section):
    """The adapter of one tower. A key that is null has the adapter's own value."""

    r: int | None = setting(None, "Rank.", ge=1, le=65_536)
    alpha: Number | None = setting(None, "Scale.", le=1_000_000, gt=0)
    learning_rate: Number | None = setting(None, "Peak learning rate; null means that of finetune.", le=1, gt=0)
    target_modules: Annotated[str | Annotated[list[Text], Field(min_length=1)] | None, ByKind()] = setting(
        None, "Layers with an adapter, as in finetune.lora."
    )


Towers = Named[Annotated[Literal["frozen", "full"] | TowerLora, ByKind()]]


class Lora(Section):
    """The adapter.

    A key that is null takes the preset's value or, if the preset does not set it or there is none, the default
    named in its description.
    """

    preset: Preset | None = setting(
        None,
        "light (r 8, alpha 16, dropout 0.1, q_proj and v_proj), standard (16, 32, 0.05, attention), full (32, "
        "64, 0.05, attention and MLP), aggressive (64, 128, 0.05, attention and MLP) or captioner (16, 32, 0.1, T5's q "
        "and v).",
    )
    r: int | None = setting(None, "Rank, by default 8.", ge=1, le=65_536)
    alpha: Number | None = setting(
        None, "Scale, by default 16. The update is multiplied by alpha / r.", le=1_000_000, gt=0
    )
    dropout: Number | None = setting(None, "Dropout on the adapter's input, by default 0.05.", ge=0, lt=1)
    target_modules: Annotated[str | Annotated[list[Text], Field(min_length=1)] | None, ByKind()] = setting(
        None,
        "Layers with an adapter: `all-linear` (the default), `attention`, `mlp`, or a list of `attention`, "
        "`mlp` and module names.",
    )
    bias: Bias | None = setting(None, "Which biases are trained, by default none.")
    use_rslora: bool | None = setting(
        None, "Whether to scale by alpha / sqrt(r) instead of alpha / r, by default false."
    )
    use_dora: bool | None = setting(None, "Whether to use weight-decomposed LoRA (DoRA), by default false.")
    init: Init | None = setting(
        None,
        "Initialization, with peft's names; by default `default`. PiSSA and OLoRA adapters are saved as plain "
        "LoRA of twice the rank.",
    )
    towers: Towers = setting(
        {},
        "What is trained of each tower, by its name: `frozen`, `full` (all its weights), or the keys of an adapter of "
        "its own. Towers: encoder, decoder (seq2seq); text, vision, projector (image-text); text, vision "
        "(dual-encoder). A tower that is not named has the adapter as configured above; of an image-text model, only "
        "the text tower has one, and the others are frozen.",
        exclude_if=is_unset,
    )


class Objective(Section):
    """The loss that a training minimizes: a mixture of cross-entropy and the divergence from a teacher's predictions.

    The divergence is taken over the whole vocabulary at the positions of the targets.
    """

    ce: Number = setting(1.0, "Weight of the cross-entropy.", ge=0, le=1_000_000)
    kl: Number = setting(
        0.0,
        "Weight of the divergence between the teacher's and the student's predictions. Above 0, each training also "
        "loads the teacher. Only for causal and sequence-to-sequence models.",
        ge=0,
        le=1_000_000,
    )
    temperature: Number = setting(
        1.0,
        "Divides the logits of both models in the divergence, which is multiplied by its square.",
        gt=0,
        le=1_000,
    )
    divergence: Literal["forward", "reverse", "js"] = setting(
        "forward",
        "forward is KL(teacher || student), reverse KL(student || teacher), and js the generalized Jensen-Shannon "
        "divergence, which lies between the two.",
    )
    beta: Number = setting(
        0.5, "Of js: near 0 it is like forward, near 1 like reverse, each up to a factor.", gt=0, lt=1
    )
    teacher: str | None = setting(
        None,
        "The model to learn from: a name of `models` with the same tokenizer. Null means the dense model that the "
        "candidate was pruned from.",
    )

    def idle(self) -> list[str]:
        """Return the keys with other values than the defaults that have no effect, because `kl` is 0."""
        fields = type(self).model_fields
        return [] if self.kl else [name for name, value in self if value != fields[name].default]


def _without_teacher(objective: Objective) -> bool:
    return not objective.kl


class Finetune(Section):
    """How pruned models are fine-tuned with LoRA."""

    data: TrainingData = section(TrainingData)
    lora: Lora = section(Lora)
    objective: Objective = section(Objective, reruns=["finetune", "ablation"], exclude_if=_without_teacher)
    epochs: Number = setting(
        2, "Passes over the training examples.", reruns=["finetune"], unit="epochs", le=100_000, gt=0
    )
    max_steps: int | None = setting(
        None,
        "Number of optimizer steps. If it is set, epochs is ignored.",
        reruns=["finetune"],
        unit="steps",
        ge=1,
        le=1_000_000_000,
    )
    learning_rate: Number = setting(0.0001, "Peak learning rate.", le=1, gt=0)
    schedule: Schedule = setting("linear", "Learning rate schedule after warm-up, with the names of transformers.")
    weight_decay: Number = setting(0.0, "AdamW's weight decay.", ge=0, le=100)
    batch_size: int = setting(64, "Examples per optimizer step.", unit="examples", ge=1, le=1_000_000)
    micro_batch_size: int = setting(
        4,
        "Limits memory, not speed: at most micro_batch_size x cutoff_len tokens are processed at a time. The "
        "number is halved if they do not fit.",
        reruns=["nothing"],
        unit="examples",
        ge=1,
        le=1_000_000,
    )
    arrangement: Literal["tree", "sorted"] | None = setting(
        None,
        "How the examples of a step are computed: as a prefix tree, in which a shared beginning is computed "
        "once, or sorted by length. The gradients are the same. Null uses the tree if the model's attention "
        "allows it.",
        reruns=["nothing"],
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Whether to save memory by computing activations again in the backward pass. Null decides by an "
        "estimate of the memory.",
        reruns=["nothing"],
    )
    sharding: bool | None = setting(
        None,
        "Whether to shard the frozen weights over the GPUs of `resources_per_job.finetune.gpu` (FSDP). Null "
        "does so if they do not fit on one GPU. It has no effect with one GPU.",
        reruns=["nothing"],
    )
    early_stopping: int | None = setting(
        None,
        "Stop training after this many validation losses in a row without a new best one. Null never stops early.",
        reruns=["finetune"],
        ge=1,
        le=1_000_000_000,
    )
    best_by: str | None = setting(
        None,
        "The metric by which the best checkpoint of a training is chosen. Null means the validation loss. A model "
        "whose kind generates answers can use one of those, such as bleu4 or exact_match; a dual encoder recall@1.",
        reruns=["finetune", "ablation"],
        exclude_if=is_unset,
    )
    warmup_steps: int = setting(
        100, "Warm-up steps, over which the learning rate rises.", unit="steps", ge=0, le=1_000_000_000
    )
    eval_steps: int = setting(100, "Steps between two validation losses.", unit="steps", ge=1, le=1_000_000_000)
    save_steps: int = setting(
        200,
        "Steps between two checkpoints. A killed job loses at most this many steps.",
        reruns=["nothing"],
        unit="steps",
        ge=1,
        le=1_000_000_000,
    )
    report_to: Unique[Tracker] = setting(
        [], "Experiment trackers, with the names of transformers (tensorboard, wandb, ...).", reruns=["nothing"]
    )
    merge: bool = setting(
        False, "Whether to also write a checkpoint with the adapter merged into the weights.", reruns=["finetune"]
    )
    keep_sparsity: Literal["mask", "merge-refused", "off"] = setting(
        "mask",
        "What happens to the zeros of a checkpoint that was pruned in single weights (unstructured, 2:4; at least 1 % "
        "zeros in its linear layers). mask keeps them: all weights are trained under a mask, and merging an adapter "
        "leaves zeros zero. merge-refused: no training may fill them, and no adapter is merged. off: they are lost, "
        "and a merged checkpoint is written to `merged-dense`. Dense checkpoints are trained in the same way under "
        "all three.",
        reruns=["finetune", "ablation"],
    )
    seeds: Annotated[Unique[Seed], Field(min_length=1)] | None = setting(
        None,
        "Seeds with which fine-tuning is repeated. The first seed's files have the usual paths, those of the "
        "others lie in `seed-<n>/` inside that folder. Null means only the study's seed. With several seeds, "
        "reports give mean and spread.",
        reruns=["compare"],
    )
