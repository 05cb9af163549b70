"""The adapter: LoRA settings as peft takes them, put on a model, checked, saved so that plain peft loads it, merged."""

import logging

from coppice.core import disks, records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import estimates

logger = logging.getLogger("coppice.finetuning")

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"),
}
# Initialisations that take their share out of the base weights; peft can write what they learn as plain LoRA.
MUTATING = ("pissa", "olora", "corda")
EVA_ROWS = 64
EVA_BATCH = 4


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
        matching = [member for member in GROUPS.get(name, (name,)) if any(matches(layer, member) for layer in layers)]
        if not matching:
            known = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
            raise SettingsError(
                f"finetune.lora.target_modules: '{name}' matches no linear layer of the model "
                f"(it has {', '.join(known)})"
            )
        found += [member for member in matching if member not in found]
    return found


def matches(layer, name):
    """Whether the dotted name `layer` is the module `name`, or ends in it."""
    return layer == name or layer.endswith(f".{name}")


def lora_config(model, settings):
    """The `peft.LoraConfig` of resolved `settings` for `model`."""
    from peft import EvaConfig, LoftQConfig, LoraConfig, TaskType

    init = settings["init"]
    more = {}
    if init == "eva":
        more["eva_config"] = EvaConfig()
    if init == "loftq":
        more["loftq_config"] = LoftQConfig(loftq_bits=4)
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
        **more,
    )


def prepare(model, settings, quantize, train):
    """`model` with a new adapter of `settings` (the section `finetune`), ready to be trained on `train` examples."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    checkpointing = checkpoints_activations(model, settings)
    if quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    lora = settings["lora"]
    try:
        model = get_peft_model(model, lora_config(model, lora))
    except (ValueError, NotImplementedError, ImportError, AssertionError) as error:
        raise SettingsError(f"finetune.lora: peft refuses these settings: {error}") from error
    _put_in_order(model.peft_config["default"])
    if lora["init"] == "eva":
        _initialize_by_activations(model, train)
    return model


def _put_in_order(config):
    """Sort what peft keeps as sets: it would write them in another order in each process, and the adapter's
    fingerprint, by which evaluations know it, would be another one whenever a training is restored."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def _initialize_by_activations(model, train):
    """EVA: the directions in which the layers' inputs on the training data vary most."""
    import torch
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    rows = sorted((example["input_ids"] for example in train[:EVA_ROWS]), key=len)
    batches = []
    for start in range(0, len(rows), EVA_BATCH):
        part = rows[start : start + EVA_BATCH]
        length = max(map(len, part))
        ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in part], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in part], device=device)
        batches.append({"input_ids": ids, "attention_mask": mask})
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def counts(model):
    """(trained parameters, all parameters), the adapter's counted in."""
    return model.get_nb_trainable_parameters()


def remember(model, example, settings, output):
    """The folder with the adapter as it was before training, where saving it as plain LoRA needs that; else None."""
    if not settings["lora"]["init"].startswith(MUTATING):
        return None
    folder = output / "initial_adapter"  # peft makes a module name of it: no dot, no dash
    initial = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True  # so that peft reads it back as it stands
    model.save_pretrained(folder)
    model.peft_config["default"].init_lora_weights = initial
    return folder


def check_acts(model, example, initial=None):
    """Refuse an adapter that changes no logit of an example it was trained on, or that is still as it was at first.

    initial: the folder of the adapter before training, for initialisations that act from the start.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.tensor([example["input_ids"]], device=device)
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            plain = model(input_ids=ids, use_cache=False).logits
    if torch.equal(adapted, plain) or (initial and _unchanged(model, initial)):
        raise CoppiceError("finetune: the trained adapter changes no logit; check finetune.lora and the learning rate")


def _unchanged(model, initial):
    from peft import get_peft_model_state_dict, load_peft_weights

    before = load_peft_weights(str(initial), device="cpu")
    return all(before[name].equal(tensor.cpu()) for name, tensor in get_peft_model_state_dict(model).items())


def restore(model, checkpoint, device):
    """Put the adapter in the folder `checkpoint` on `model`."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(device)))


def save(model, tokenizer, output, initial=None, source=None):
    """Write the adapter and the tokenizer; the adapter's files replace older ones only when they are whole.

    initial: the folder of the adapter before training, by which one whose initialisation changed the base weights is
    written as plain LoRA on the unchanged base.
    """
    partial = output / f"{disks.partial_name()}adapter"
    options = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    model.save_pretrained(partial, **options)
    tokenizer.save_pretrained(partial)
    records.move_in(partial, output)


def checkpoints_activations(model, settings):
    """Whether to compute activations again in the backward pass: as set, else where they would not fit otherwise.

    The estimate is that of `estimates.kept_values`.
    """
    wanted = settings["gradient_checkpointing"]
    if wanted is not None:
        return wanted
    import torch

    if not torch.cuda.is_available():
        return False
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widths = estimates.kept_values(config.hidden_size, inner)
    budget = settings["micro_batch_size"] * settings["data"]["cutoff_len"]
    needed = budget * config.num_hidden_layers * widths * next(model.parameters()).element_size()
    free, _ = torch.cuda.mem_get_info()
    if needed > 0.8 * free:
        logger.info("gradient checkpointing: activations would take %.1f of %.1f GB", needed / 1e9, free / 1e9)
    return needed > 0.8 * free
