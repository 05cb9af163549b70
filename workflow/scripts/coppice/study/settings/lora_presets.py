"""The adapter's settings: what the field's presets and schemes stand for, and what holds where nothing is said."""

PRESETS = {
    "light": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "standard": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "attention"},
    "full": {"r": 32, "alpha": 64, "dropout": 0.05, "target_modules": ["attention", "mlp"]},
    "aggressive": {"r": 64, "alpha": 128, "dropout": 0.05, "target_modules": ["attention", "mlp"]},
}
# Whole sets, biases and all, that tuning guides offer as starting points; arms of an ablation know them by name
SCHEMES = {
    "conservative": {"r": 32, "alpha": 64, "dropout": 0.05, "target_modules": "attention", "bias": "none"},
    "balanced": {"r": 32, "alpha": 128, "dropout": 0.05, "target_modules": "attention", "bias": "lora_only"},
    "aggressive": {
        "r": 64,
        "alpha": 128,
        "dropout": 0.05,
        "target_modules": ["attention", "mlp"],
        "bias": "lora_only",
    },
    "efficient": {"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "bias": "none"},
}
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


def resolve(lora):
    """`finetune.lora` with nothing left open: a key that is set wins, else the preset's value, else the default."""
    preset = PRESETS.get(lora["preset"], {})
    resolved = {key: preset.get(key, default) if lora[key] is None else lora[key] for key, default in DEFAULTS.items()}
    return {"preset": lora["preset"], **resolved}
