"""The LoRA settings as peft takes them, and the model's linear layers that they name."""

from ..errors import SettingsError

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"),
}


def linear_layers(model):
    """Dotted names of the linear layers of `model`, the output layer left out."""
    import torch

    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def target_modules(model, wanted):
    """What peft takes for `wanted`: "all-linear", or module names, each found in `model`.

    `wanted` is "all-linear", a group (`attention`, `mlp`), a module name, or a list of groups and names.
    """
    if wanted == "all-linear":
        return wanted
    layers = linear_layers(model)
    found = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        matching = [member for member in GROUPS.get(name, (name,)) if any(_matches(layer, member) for layer in layers)]
        if not matching:
            known = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
            raise SettingsError(
                f"finetune.lora.target_modules: '{name}' matches no linear layer of the model "
                f"(it has {', '.join(known)})"
            )
        found += [member for member in matching if member not in found]
    return found


def _matches(layer, name):
    return layer == name or layer.endswith(f".{name}")


def lora_config(model, settings):
    """The `peft.LoraConfig` of resolved `settings` for `model`."""
    from peft import LoraConfig, TaskType

    init = settings["init"]
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=target_modules(model, settings["target_modules"]),
        bias=settings["bias"],
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        init_lora_weights=True if init == "default" else init,
    )
