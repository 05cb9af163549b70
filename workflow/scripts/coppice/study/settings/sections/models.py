"""The section `models`."""

from typing import Literal

from coppice.models import kinds

from .candidates import Calibration, GridPoint
from .evaluate import Evaluate
from .finetune import Finetune
from .forms import Text
from .section import Section, setting

Dtype = Literal["float32", "float16", "bfloat16"]
Prompt = Literal["alpaca", "chat", "none"]
Kind = Literal[tuple(kinds.KINDS)]


class Model(Section):
    """A model."""

    base: Text = setting(
        ...,
        "A hub id (`org/name`), a local folder (`/...`, `./...`, `../...`, `~/...`) or "
        "`miniature/<family>[-instruct]`.",
    )
    variant: Literal["base", "instruct"] = setting(
        "base",
        "Whether the model was tuned to follow instructions. Reports compare base and instruct models.",
        reruns=["finetune", "evaluate", "ablation"],
    )
    family: Text | None = setting(
        None,
        "Architecture family, any name; reports compare families. Null takes it from the base: the `model_type` of a "
        "local folder, the beginning of a hub model's name.",
        reruns=["report"],
    )
    prompt: Prompt | None = setting(
        None,
        "Prompt format of fine-tuning examples: alpaca's template, the tokenizer's chat template, or none "
        "(only the instruction and the response). Null means alpaca for base models and chat for instruct "
        "models.",
        reruns=["finetune", "evaluate", "ablation"],
    )
    kind: Kind | None = setting(
        None,
        "What the model is: causal-lm (text in, next token out), seq2seq (T5, BART), image-text (Qwen3-VL) or "
        "dual-encoder (CLIP). Null takes it from the `config.json` of a local folder. A model from the hub is then "
        "taken for causal-lm, and the job that fetches it fails if it is of another kind.",
        reruns=["data", "finetune", "evaluate", "ablation"],
    )
    revision: str | None = setting(
        None, "Commit, tag or branch on the hub. Null means the newest commit at the first fetch."
    )
    dtype: Dtype | None = setting(
        None,
        "Number format of the model. Null means bfloat16 on a GPU that supports it, float32 elsewhere.",
        reruns=["prune", "evaluate", "ablation"],
    )
    quantize: Literal["8bit", "4bit"] | None = setting(
        None,
        "Quantization by bitsandbytes with which the base is loaded. Null means none.",
        reruns=["prune", "evaluate", "ablation"],
    )
    trust_remote_code: bool = setting(
        False,
        "Whether to run Python code that comes with the model. Only for sources that you trust.",
        reruns=["prune", "evaluate", "ablation"],
    )
    device_map: str | None = setting(
        None,
        "Placement on several devices as in transformers (auto, balanced, balanced_low_0 or sequential), or a "
        "single device (cpu, cuda:N or N). Null means one device.",
        reruns=["nothing"],
        pattern="^(auto|balanced|balanced_low_0|sequential|cpu|(cuda:)?[0-9]{1,4})$",
    )
    context_length: int | None = setting(
        None,
        "The most tokens that the model takes. Null means as its `config.json` says; some architectures do not say it "
        "(Mamba, BLOOM) and need this key.",
        unit="tokens",
        reruns=["prune", "evaluate", "ablation"],
        ge=2,
        le=100_000_000,
    )
    eos_token: Text | None = setting(
        None,
        "The token that ends a text, in place of the tokenizer's own. A tokenizer without one needs this key.",
        reruns=["prune", "evaluate", "ablation"],
    )
    parameters: int | None = setting(
        None,
        "Number of parameters, by which jobs request memory and run time until the model is fetched. Null "
        "means unknown until then.",
        reruns=["nothing"],
        ge=1,
        le=10**15,
    )
    prune: list[GridPoint] | None = setting(
        None, "A grid for this model that replaces candidates.prune.", reruns=["prune"]
    )
    calibration: Calibration | None = setting(
        None,
        "Keys of the section `candidates.calibration` with other values for this model. A model that does not read "
        "plain text is calibrated on its training data unless this names a data set.",
        reruns=["prune"],
    )
    finetune: Finetune | None = setting(
        None,
        "Keys of the section `finetune` with other values for this model. A preset of its own replaces the study's "
        "adapter.",
        reruns=["finetune", "ablation"],
    )
    evaluate: Evaluate | None = setting(
        None,
        "Keys of the section `evaluate` with other values for this model.",
        reruns=["score", "evaluate", "ablation"],
    )
