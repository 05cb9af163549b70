"""Presets, schemes and defaults of the LoRA adapter's settings."""

from coppice.core.aliases import Record

PRESETS = {
    "light": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    "standard": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "attention"},
    "full": {"r": 32, "alpha": 64, "dropout": 0.05, "target_modules": ["attention", "mlp"]},
    "aggressive": {"r": 64, "alpha": 128, "dropout": 0.05, "target_modules": ["attention", "mlp"]},
    "captioner": {"r": 16, "alpha": 32, "dropout": 0.1, "target_modules": ["q", "v"]},  # names of T5's layers
}
# Complete sets of values, biases included, that tuning guides recommend as starting points; ablation arms can name them
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


def resolve(lora: Record) -> Record:
    """Return `finetune.lora` with every key filled: the configured value, else the preset's, else the default.

    The adapters of single towers are kept as they are, because their keys have the values of the whole adapter.
    """
    preset = PRESETS.get(lora["preset"], {})
    resolved = {key: preset.get(key, default) if lora[key] is None else lora[key] for key, default in DEFAULTS.items()}
    towers = {key: lora[key] for key in ("towers",) if key in lora}
    return {"preset": lora["preset"], **resolved, **towers}
