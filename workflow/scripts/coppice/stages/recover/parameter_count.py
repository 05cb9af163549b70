"""Count the parameters that a training would train, from the checkpoint's configuration, before loading any weights."""

from coppice import models

from . import lora


def trainable_parameters(source, settings):
    """Return how many parameters of the checkpoint `source` (a models.Source) would be trained.

    settings: the section `finetune`. The count comes from a model without weights. Each adapted linear layer has
    r * (inputs + outputs) parameters, with DoRA one magnitude per output more; trained biases are added.
    """
    model = models.skeleton(source)
    if settings.get("train") == "all":
        return models.parameters(model)
    adapter = settings["lora"]
    wanted = lora.target_modules(model, adapter["target_modules"])
    layers = {name: model.get_submodule(name) for name in lora.linear_layers(model)}
    adapted = [layer for name, layer in layers.items() if _is_wanted(name, wanted)]
    sizes = [adapter["r"] * (m.in_features + m.out_features) + adapter["use_dora"] * m.out_features for m in adapted]
    return sum(sizes) + _biases(model, adapted, adapter["bias"])


def _is_wanted(name, wanted):
    return wanted == "all-linear" or any(lora.matches(name, member) for member in wanted)


def _biases(model, adapted, kind):
    if kind == "lora_only":
        return sum(layer.bias.numel() for layer in adapted if layer.bias is not None)
    named = model.named_parameters() if kind == "all" else ()
    return sum(parameter.numel() for name, parameter in named if "bias" in name)
