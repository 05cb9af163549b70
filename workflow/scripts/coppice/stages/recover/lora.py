"""LoRA adapters: configure one, put it on a model, check that it works, and save it so that plain peft loads it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice import models
from coppice.core import disks, records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import adapters, estimates
from coppice.models.kinds import Example, ModelKind
from coppice.study.settings.sections.finetune import Lora as Adapter

from . import base, tower_adapters
from .activations import checkpoints_activations
from .training_request import TrainingSettings

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger("coppice.finetuning")

# These initializations subtract the initial adapter from the base weights. An adapter trained that way does not fit
# the original base, so `save` has peft convert it to plain LoRA.
MUTATING = ("pissa", "olora", "corda")
EVA_ROWS = 64
EVA_BATCH = 4


class Lora(base.Trained["PeftModel", Path | None]):
    """Trains low-rank adapters beside the frozen weights."""

    adapter = True
    operations = base.FORWARD + base.GRADIENT_OF_INPUTS

    def prepare(
        self,
        model: PreTrainedModel,
        kind: ModelKind,
        source: models.Source,
        settings: TrainingSettings,
        train: Sequence[Example],
    ) -> PeftModel:
        """Return the model with a new adapter; see `base.Trained.prepare`."""
        from peft import prepare_model_for_kbit_training

        checkpointing = checkpoints_activations(model, settings)
        if source.quantize:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        elif checkpointing:
            model.gradient_checkpointing_enable()
            # With frozen embeddings the inputs of the first checkpointed block need no gradient, and without this
            # reentrant checkpointing would cut the gradient off there.
            model.enable_input_require_grads()
        if tower_adapters.trained_whole(settings.lora):
            if source.quantize:
                raise SettingsError(
                    "finetune.lora.towers: a tower is full, but the weights of a quantized model cannot be trained. "
                    "Leave out models.X.quantize."
                )
            model = model.float()  # half precision would round small updates of these weights away
        model = _with_adapter(model, kind, settings.lora)
        _sort_sets(model.peft_config["default"])
        if settings.lora.init == "eva":
            _initialize_by_activations(model, kind, train)
        return model

    def predict(self, model: PreTrainedModel, kind: ModelKind, settings: TrainingSettings) -> int:
        """Return the number of the adapter's parameters, and of trained biases; the model gets an adapter."""
        # Initializations that read weights have none to read here, and all give adapters of the same sizes
        adapter = settings.lora.model_copy(update={"init": "default"})
        return _with_adapter(model, kind, adapter).get_nb_trainable_parameters()[0]

    def counts(self, model: PeftModel) -> tuple[int, int]:
        """Return (trainable parameters, all parameters), both with those of the adapter."""
        return model.get_nb_trainable_parameters()  # knows the size of quantized weights, which are packed

    def rates(self, model: PeftModel, kind: ModelKind, settings: TrainingSettings) -> base.Rates:
        """Return the learning rates of towers that have their own."""
        return tower_adapters.rates(model, kind, settings.lora)

    def check_room(self, trainable: int) -> None:
        """Accept any number: the memory of an adapter is small beside that of a batch, which is cut to what fits."""

    def memory(self, shape: estimates.Shape, settings: TrainingSettings) -> estimates.TrainingMemory:
        """Return the memory of the adapter, and of what the adapted layers keep for the backward pass."""
        lora = settings.lora
        # the input of each adapted layer after dropout and the dropout mask, both in float32, the adapter's dtype
        kept = 4 * (2 if lora.dropout else 1) * estimates.adapted_inputs(shape, lora)
        trained = shape.parameters if tower_adapters.trained_whole(lora) else estimates.adapter_parameters(shape, lora)
        return estimates.TrainingMemory(trained, frozen=True, kept_bytes=kept)

    def before_training(
        self, model: PeftModel, kind: ModelKind, example: Example, settings: TrainingSettings, output: Path
    ) -> Path | None:
        """Save the untrained adapter if `save` needs it to convert it to plain LoRA; return its folder, or None."""
        if not settings.lora.init.startswith(MUTATING):
            return None
        folder = output / "initial_adapter"  # peft uses the name as a module name: no dot and no dash
        initial = model.peft_config["default"].init_lora_weights
        # peft must load this adapter as it is saved, and not run the initialization again
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder)
        model.peft_config["default"].init_lora_weights = initial
        return folder

    def check_acts(self, model: PeftModel, kind: ModelKind, example: Example, before: Path | None) -> None:
        """Raise CoppiceError if the adapter changes no output for an example, or if training did not change it.

        before: the folder of the untrained adapter, for initializations whose adapter is not zero before training.
        """
        adapted = base.outputs_of(model, kind, example)
        with model.disable_adapter():
            plain = base.outputs_of(model, kind, example)
        if adapted.equal(plain) or (before and _unchanged(model, before)):
            raise CoppiceError(
                "finetune: the trained adapter changes no logit of a training example. Check finetune.lora and "
                "finetune.learning_rate."
            )

    def restore(self, model: PeftModel, checkpoint: Path, device: torch.device) -> None:
        """Load the adapter in the folder `checkpoint` into the model."""
        adapters.fill(model, adapters.read(checkpoint), checkpoint)

    def save(
        self,
        model: PeftModel,
        reader: models.Reader,
        output: Path,
        before: Path | None,
        source: models.Source,
    ) -> None:
        """Write the adapter and the reader's files to `output`; complete files replace older ones.

        before: the folder of the untrained adapter, if its initialization changed the base weights; peft then writes
        the difference to it, as a plain LoRA adapter for the unchanged base.
        """
        partial = output / f"{disks.partial_name()}adapter"
        options = {"path_initial_model_for_weight_conversion": str(before)} if before else {}
        model.save_pretrained(partial, **options)
        reader.save(partial)
        records.move_in(partial, output)

    def folder(self, output: Path) -> Path:
        """Return the training's own folder."""
        return output


def _with_adapter(model: nn.Module, kind: ModelKind, settings: Adapter) -> PeftModel:
    """Return the model with a new adapter; settings: the section `finetune.lora`, with its preset resolved."""
    from peft import get_peft_model

    planned = tower_adapters.plan(model, kind, settings)
    try:
        found = get_peft_model(model, lora_config(model, kind, settings, planned))
    except (ValueError, NotImplementedError, ImportError, AssertionError) as error:
        if settings.dropout and "lora_dropout" in str(error):
            raise SettingsError(
                "finetune.lora.dropout: the experts of this model are one tensor, and peft has no dropout for an "
                "adapter on such a tensor. Set it to 0, or set finetune.lora.target_modules to attention."
            ) from error
        raise SettingsError(f"finetune.lora: peft rejects these settings: {error}") from error
    planned.check(found)
    return found


def lora_config(
    model: PreTrainedModel, kind: ModelKind, settings: Adapter, planned: tower_adapters.Plan | None = None
) -> LoraConfig:
    """Return peft's configuration for `model`; settings: the section `finetune.lora`, with its preset resolved.

    planned: what the adapter trains, if it is known already.
    """
    from peft import EvaConfig, LoftQConfig, LoraConfig
    from transformers.pytorch_utils import Conv1D

    init, planned = settings.init, planned or tower_adapters.plan(model, kind, settings)
    if planned.patterns and settings.use_rslora and init.startswith(MUTATING):
        raise SettingsError(
            f"finetune.lora.init: {init} with use_rslora and towers of different ranks cannot be saved as plain LoRA. "
            "Set use_rslora to false, or init to default."
        )
    more = {}
    if any(isinstance(module, Conv1D) for module in model.modules()):
        more["fan_in_fan_out"] = True
    if init == "eva":
        more["eva_config"] = EvaConfig()
    if init == "loftq":
        more["loftq_config"] = LoftQConfig(loftq_bits=4)
    return LoraConfig(
        task_type=kind.task_type,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if init == "default" else init,
        **planned.options(),
        **more,
    )


def _sort_sets(config: LoraConfig) -> None:
    """Sort the values that peft keeps as sets, so that every process writes the same adapter_config.json.

    Sets of strings have another order in each process. The adapter's fingerprint, by which evaluations recognize it,
    would change whenever a training is restored.
    """
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def _initialize_by_activations(model: PeftModel, kind: ModelKind, train: Sequence[Example]) -> None:
    """Initialize by EVA: along the directions in which the layers' inputs vary most on the training data."""
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    examples = sorted(train[:EVA_ROWS], key=kind.length)
    parts = [examples[start : start + EVA_BATCH] for start in range(0, len(examples), EVA_BATCH)]
    batches = [kind.inputs(part, device) for part in parts]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def _unchanged(model: PeftModel, initial: Path) -> bool:
    from peft import get_peft_model_state_dict, load_peft_weights

    before = load_peft_weights(str(initial), device="cpu")
    return all(before[name].equal(tensor.cpu()) for name, tensor in get_peft_model_state_dict(model).items())
