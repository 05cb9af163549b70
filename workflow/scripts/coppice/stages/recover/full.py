"""Full fine-tuning: every weight is trained. The same functions as `recipe` has for an adapter.

The weights are held in float32 while they are trained, whatever they are stored in: an update is often smaller than
half precision can tell from nothing.
"""

from coppice import models
from coppice.core import fingerprints
from coppice.core.errors import CoppiceError, SettingsError

from .lora import checkpoints_activations

MODEL = "model"  # the folder of the trained checkpoint
BYTES = 16  # a parameter in float32, its gradient and Adam's two moments


def prepare(model, settings, quantize, train):
    """`model` with all weights trainable; refused where they are quantised or cannot fit the device (DoesNotFit)."""
    if quantize:
        raise SettingsError("finetune: all weights cannot be trained in a quantised model; leave out models.X.quantize")
    check_room(models.parameters(model))
    if checkpoints_activations(model, settings):
        model.gradient_checkpointing_enable()
    return model.float().requires_grad_(True)


def check_room(parameters):
    """Raise DoesNotFit where so many parameters with their optimizer are more than a GPU holds, or without one the
    machine."""
    needed, room = BYTES * parameters, models.device_memory()
    if needed > room:
        raise DoesNotFit(
            f"full fine-tuning of {parameters / 1e9:.2f} billion parameters takes {needed / 2**30:.0f} GiB before any "
            f"activation; {models.device_kind()} memory is {room / 2**30:.0f} GiB"
        )


class DoesNotFit(CoppiceError):
    """All weights with their optimizer are more than the device can hold."""


def counts(model):
    """(trained parameters, all parameters)."""
    every = models.parameters(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), every


def remember(model, example, settings, output):
    """The logits of a training example before training."""
    return _logits(model, example)


def check_acts(model, example, before):
    """Refuse a training that changed no logit of an example it saw."""
    if _logits(model, example).equal(before):
        raise CoppiceError("finetune: the training changed no logit; check the learning rate")


def _logits(model, example):
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(input_ids=torch.tensor([example["input_ids"]], device=device), use_cache=False).logits
    model.train(was_training)
    return found.cpu()


def restore(model, checkpoint, device):
    """Put the weights in the folder `checkpoint` on `model`."""
    from safetensors.torch import load_file

    state = {}
    for path in fingerprints.weights_files(checkpoint):
        state |= load_file(path, device=str(device))
    model.load_state_dict(state, strict=False)  # tied weights are stored once


def save(model, tokenizer, output, before, source):
    """Write the trained checkpoint to the folder `model` in `output`, in the precision that it was loaded in."""
    models.save(model.to(models.dtype_of(source.dtype)), tokenizer, output / MODEL)
