"""The entries of the section `ablations`. Keys that an arm leaves out have their values in `finetune`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .finetune import Bias, Init, Mixture, Preset, Schedule, Towers
from .forms import ByKind, Inherited, Named, Number, Seed, Text, Unique
from .models import Dtype, Prompt
from .section import Partial, Section, described, section, setting
from .select import Mode

# The value of an arm's key; which kind the key takes is checked when the arm is made
Value = Annotated[str | Number | bool | list, ByKind()]
# A mapping is a value of `towers`
Varied = Annotated[str | Number | bool | list | dict[str, Any], ByKind()]
Values = Named[Annotated[list[Varied], Field(min_length=1, description="The values of the key.")]]


class Start(Partial):
    """The checkpoint from which every arm starts."""

    model: Inherited[str] = setting(None, "A model of the study. Without config, arms start from the dense model.")
    config: Inherited[str] = setting(
        None, "One of select.configs. Arms start from the pruned checkpoint of the model that it chose."
    )
    checkpoint: Inherited[Text] = setting(
        None, "A local checkpoint folder instead of a model (/..., ./..., ../... or ~/...)."
    )
    prompt: Inherited[Prompt] = setting(None, "Prompt format for a checkpoint, by default alpaca.")
    dtype: Dtype | None = setting(None, "Number format of a checkpoint; null as for models.")
    trust_remote_code: Inherited[bool] = setting(
        None, "Whether to run Python code that comes with the checkpoint, by default false."
    )
    context_length: Inherited[int] = setting(
        None, "The most tokens that the checkpoint takes, as in models.", unit="tokens", ge=2, le=100_000_000
    )
    eos_token: Inherited[Text] = setting(None, "The token that ends a text, as in models.")


class Arm(Partial):
    """An arm of an ablation."""

    name: Inherited[str] = setting(None, "The arm's name in paths and reports, by default made from the keys it sets.")
    train: Inherited[Literal["lora", "all"]] = setting(
        None, "What is trained: an adapter, or all weights (full fine-tuning, as a reference if it fits into memory)."
    )
    preset: Inherited[Preset] = setting(
        None, "A preset as in finetune.lora. Other keys of the arm override its values."
    )
    scheme: Inherited[Literal["conservative", "balanced", "aggressive", "efficient"]] = setting(
        None,
        "A scheme with dropout 0.05: conservative (r 32, alpha 64, attention), balanced (r 32, alpha 128, "
        "attention, bias lora_only), aggressive (r 64, alpha 128, attention and MLP, bias lora_only) or "
        "efficient (r 8, alpha 16, q_proj and v_proj).",
    )
    r: Inherited[int] = setting(None, "Rank.", ge=1, le=65_536)
    alpha: Inherited[Annotated[Number | str, ByKind()]] = setting(
        None, "Scale, as a number or a multiple of the rank (`r`, `2r`)."
    )
    dropout: Inherited[Number] = setting(None, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: Inherited[Annotated[str | list[str], ByKind()]] = setting(
        None, "Layers with an adapter, as in finetune.lora."
    )
    bias: Inherited[Bias] = setting(None, "Which biases are trained.")
    use_rslora: Inherited[bool] = setting(None, "Whether to scale by alpha / sqrt(r) instead of alpha / r.")
    use_dora: Inherited[bool] = setting(None, "Whether to use weight-decomposed LoRA (DoRA).")
    init: Inherited[Init] = setting(None, "Initialization, with peft's names.")
    towers: Inherited[Towers] = setting(
        None, "What is trained of each tower, as in finetune.lora.towers, in place of the value there."
    )
    learning_rate: Inherited[Number] = setting(None, "Peak learning rate.", gt=0)
    schedule: Inherited[Schedule] = setting(None, "Learning rate schedule after warm-up.")
    weight_decay: Inherited[Number] = setting(None, "AdamW's weight decay.", ge=0)
    batch_size: Inherited[int] = setting(
        None,
        "Examples per optimizer step. With a budget of steps, all arms must have the same.",
        unit="examples",
        ge=1,
        le=1_000_000,
    )
    warmup_steps: Inherited[int] = setting(
        None, "Warm-up steps, over which the learning rate rises.", unit="steps", ge=0, le=1_000_000_000
    )


class TuningStage(Section):
    """A stage of a staged ablation."""

    name: str = setting(..., "The stage's name in paths and reports.")
    vary: Values = setting(..., "Keys of an arm with lists of values. Every combination is an arm of this stage.")
    with_: Named[Annotated[Value, Field(description="The value of the key.")]] = setting(
        {}, "Keys of an arm that all arms of this stage also set: `{alpha: 2r}`.", alias="with"
    )


class ArmData(Partial):
    """The training examples of every arm. Keys that are not set have their values in `finetune.data`."""

    dataset: Inherited[Mixture] = setting(None, "Name of a data set, or a mixture as in finetune.data.dataset.")
    val_size: Inherited[Number] = setting(
        None, "Number of rows held out from training for the validation loss; below 1, the share of rows.", gt=0
    )
    validation: str | None = setting(None, "A data set whose train rows give the validation loss.")
    cutoff_len: Inherited[int] = setting(
        None, "Maximum tokens per example; longer examples are cut.", unit="tokens", ge=8, le=10_000_000
    )
    train_on_inputs: Inherited[bool] = setting(None, "Whether the loss includes the prompt's tokens.")


class Budget(Partial):
    """The training budget of every arm, in one of three units; by default 5000 steps."""

    max_steps: Inherited[int] = setting(None, "Optimizer steps.", unit="steps", ge=1, le=1_000_000_000)
    tokens: Inherited[Number] = setting(
        None, "Training tokens. Training ends with the step that reaches the number.", unit="tokens", gt=0
    )
    flops: Inherited[Number] = setting(
        None,
        "Floating-point operations, counted as 4 (LoRA) or 6 (all weights) per parameter and token. Training "
        "ends with the step that reaches the number.",
        unit="FLOP",
        gt=0,
    )


class ChooseBy(Section):
    """The metric that ranks arms and decides stages. It is measured on data that the report's metrics do not use."""

    metric: str = setting(
        "validation_loss",
        "validation_loss, average_acc, a task, ppl.<text>, or another metric that arms are compared in.",
    )
    mode: Mode | None = setting(None, "Whether the lowest or the highest value is best. Null decides by the metric.")


class ArmMetrics(Section):
    """The metrics in which arms are compared. Null means all that the model which arms start from is evaluated by."""

    tasks: Unique[str] | None = setting(None, "Zero-shot tasks from evaluate.zero_shot.tasks.")
    perplexity: Unique[str] | None = setting(None, "Texts from evaluate.perplexity.datasets.")
    answers: Unique[str] | None = setting(None, "Data sets from evaluate.answers.datasets.")
    retrieval: Unique[str] | None = setting(None, "Data sets from evaluate.retrieval.datasets.")
    classification: Unique[str] | None = setting(None, "Data sets from evaluate.classification.datasets.")
    limit: int | None = setting(
        None,
        "Maximum number of items per task. Null means the value of evaluate.zero_shot.limit.",
        ge=1,
        le=1_000_000_000,
    )


class Racing(Section):
    """Stop arms early by successive halving on the validation loss, averaged over seeds.

    Null trains all arms to the end. A race saves time but may stop the best arm; the report says how much was saved
    and risked.
    """

    rungs: int = setting(2, "How often arms are stopped before the end.", ge=1, le=100)
    eta: Number = setting(
        2, "At each rung, one in eta arms continues. Rungs are at budget / eta, budget / eta^2, ... steps.", gt=1
    )


class Ablation(Section):
    """An ablation."""

    start: Start = setting(..., "The checkpoint from which every arm starts.")
    arms: Inherited[Annotated[list[Annotated[str | Arm, ByKind()]], Field(min_length=1)]] = setting(
        None,
        "The arms. Each is the name of a preset or scheme (light, standard, full, aggressive, captioner, "
        "conservative, balanced, efficient), or a mapping of the keys it sets.",
    )
    grid: Inherited[Values] = setting(
        None,
        "Keys of an arm with lists of values. Every combination is an arm: `{r: [8, 16], learning_rate: "
        "[1e-4, 3e-4]}`.",
    )
    staged: Inherited[Annotated[bool | Annotated[list[TuningStage], Field(min_length=1)], ByKind()]] = setting(
        None,
        "Stages, each of which starts from the winner of the stage before. `true` means the usual order: rank "
        "at alpha = 2r, alpha, dropout, bias, target modules, rsLoRA and DoRA. At the end, the starting "
        "configuration and the combination of the winners are compared on data that no stage used.",
    )
    base: Annotated[str | Arm, ByKind()] = setting(
        Arm(),
        "Values of an arm's keys that apply to every arm that does not set them. Other keys have their values "
        "in `finetune`.",
    )
    data: ArmData = section(ArmData)
    budget: Budget = section(Budget)
    seeds: Annotated[Unique[Seed], Field(min_length=1)] | None = setting(
        None,
        "Seeds with which every arm is trained. Null means only the study's seed. An interval over seeds "
        "needs at least three to be informative.",
    )
    eval_steps: int | None = setting(
        None,
        "Steps between two validation losses. Null means the value in `finetune`, or a tenth of the budget if "
        "that is smaller.",
        unit="steps",
        ge=1,
        le=1_000_000_000,
    )
    choose_by: ChooseBy = section(ChooseBy)
    metrics: ArmMetrics = section(ArmMetrics)
    reference: str | None = setting(
        None,
        "The arm with which the others are compared. Null means the first arm or, in a staged ablation, the "
        "starting configuration.",
    )
    racing: Racing | None = setting(None, described(Racing))
