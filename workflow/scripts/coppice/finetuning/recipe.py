"""The LoRA settings: presets, what they resolve to, and the model's linear layers that they name."""

from ..errors import SettingsError, nearest

DEFAULTS = {
    "r": 8,
    "alpha": 16,
    "dropout": 0.05,
    "target_modules": "all-linear",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init": "default",
}
PRESETS = {
    "light": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "standard": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "attention"},
    "full": {"r": 32, "alpha": 64, "dropout": 0.05, "target_modules": "attention+mlp"},
    "aggressive": {"r": 64, "alpha": 128, "dropout": 0.05, "target_modules": "attention+mlp"},
}
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"),
}
GROUPS["attention+mlp"] = GROUPS["attention"] + GROUPS["mlp"]


def resolve(settings):
    """`finetune.lora` with every key filled: a key that is set wins, else the preset's, else the default."""
    preset = settings.get("preset")
    if preset is not None and preset not in PRESETS:
        raise SettingsError(
            f"finetune.lora.preset: there is no preset '{preset}'{nearest(preset, PRESETS)} "
            f"(known: {', '.join(PRESETS)})"
        )
    given = {key: value for key, value in settings.items() if value is not None}
    return DEFAULTS | PRESETS.get(preset, {}) | given | {"preset": preset}


def linear_layers(model):
    """Dotted names of the linear layers of `model`, the output layer left out."""
    import torch

    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def target_modules(model, wanted):
    """What peft takes for `wanted`: "all-linear", or the module names of a group or list, each found in `model`."""
    if wanted == "all-linear":
        return wanted
    layers = linear_layers(model)
    if isinstance(wanted, str) and wanted in GROUPS:
        found = [name for name in GROUPS[wanted] if any(_matches(layer, name) for layer in layers)]
        if found:
            return found
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if not any(_matches(layer, name) for layer in layers):
            known = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
            raise SettingsError(
                f"finetune.lora.target_modules: '{name}' matches no linear layer of the model "
                f"(it has {', '.join(known)})"
            )
    return names


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
