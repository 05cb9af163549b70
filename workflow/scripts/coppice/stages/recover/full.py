"""Full fine-tuning: train every weight. Offers the same functions as `lora` does for an adapter.

Weights are in float32 while they are trained, whatever their stored dtype, because half precision would round small
updates away.
"""

from coppice import models
from coppice.core import fingerprints
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import kinds

from .lora import checkpoints_activations

MODEL = "model"  # the folder of the trained checkpoint
BYTES = 16  # per parameter: its float32 value, its gradient and Adam's two moments


def prepare(model, settings, quantize, train):
    """Return `model` in float32 with all weights trainable.

    Raises:
        SettingsError: The weights are quantized.
        DoesNotFit: Weights, gradients and optimizer exceed the device's memory.
    """
    if quantize:
        raise SettingsError(
            "finetune: all weights cannot be trained in a quantized model. Leave out models.X.quantize."
        )
    check_room(models.parameters(model))
    if checkpoints_activations(model, settings):
        model.gradient_checkpointing_enable()
    return model.float().requires_grad_(True)


def check_room(parameters):
    """Raise DoesNotFit if training `parameters` weights takes more memory than the GPU has, or the host without one."""
    needed, room = BYTES * parameters, models.device_memory()
    if needed > room:
        raise DoesNotFit(
            f"full fine-tuning of {parameters / 1e9:.2f} billion parameters takes {needed / 2**30:.0f} GiB before any "
            f"activation, but {models.device_kind()} memory is {room / 2**30:.0f} GiB; train with LoRA (train: lora), "
            "choose a smaller model, or use a device with more memory"
        )


class DoesNotFit(CoppiceError):
    """All weights with their gradients and optimizer take more memory than the device has."""


def counts(model):
    """Return (trainable parameters, all parameters)."""
    every = models.parameters(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), every


def remember(model, example, settings, output):
    """Return the logits of a training example before training, for `check_acts`."""
    return _logits(model, example)


def check_acts(model, example, before):
    """Raise CoppiceError if training changed no logit of a training example."""
    if _logits(model, example).equal(before):
        raise CoppiceError("finetune: training changed no logit of a training example. Check finetune.learning_rate.")


def _logits(model, example):
    import torch

    kind, was_training = kinds.of(model.config), model.training
    model.eval()
    with torch.no_grad():
        found = kind.outputs(model, kind.inputs([example], next(model.parameters()).device))
    model.train(was_training)
    return found.cpu()


def restore(model, checkpoint, device):
    """Load the weights in the folder `checkpoint` into `model`."""
    from safetensors.torch import load_file

    state = {}
    for path in fingerprints.weights_files(checkpoint):
        state |= load_file(path, device=str(device))
    model.load_state_dict(state, strict=False)  # tied weights are stored once, so one of their two names is missing


def save(model, tokenizer, output, before, source):
    """Write the trained checkpoint to the folder `model` in `output`, in the dtype that it was loaded in."""
    models.save(model.to(models.dtype_of(source.dtype)), tokenizer, output / MODEL)
