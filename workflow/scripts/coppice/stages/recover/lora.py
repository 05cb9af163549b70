"""LoRA adapters: configure one, put it on a model, check that it works, and save it so that plain peft loads it."""

import logging

from coppice.core import disks, records
from coppice.core.errors import CoppiceError, SettingsError
from coppice.models import estimates, kinds

logger = logging.getLogger("coppice.finetuning")

# These initializations subtract the initial adapter from the base weights. An adapter trained that way does not fit
# the original base, so `save` has peft convert it to plain LoRA.
MUTATING = ("pissa", "olora", "corda")
EVA_ROWS = 64
EVA_BATCH = 4


def linear_layers(model):
    """Return the dotted names of the linear layers of `model`, without the output layer."""
    import torch

    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def target_modules(model, wanted):
    """Return `target_modules` as peft takes them: "all-linear", or module names that exist in `model`.

    wanted: "all-linear", a group that the model's kind names (`attention`, `mlp`), a module name, or a list of groups
        and names.
    """
    if wanted == "all-linear":
        return wanted
    layers, groups = linear_layers(model), kinds.of(model.config).adapter_groups
    found = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        matching = [member for member in groups.get(name, (name,)) if any(matches(layer, member) for layer in layers)]
        if not matching:
            available = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
            raise SettingsError(
                f"finetune.lora.target_modules: '{name}' matches no linear layer of the model. Choose from "
                f"{', '.join(available)}."
            )
        found += [member for member in matching if member not in found]
    return found


def matches(layer, name):
    """Return whether the dotted name `layer` is `name` or ends with it, as peft matches names."""
    return layer == name or layer.endswith(f".{name}")


def lora_config(model, settings):
    """Return the `peft.LoraConfig` for `model`; settings: the section `finetune.lora`, with its preset resolved."""
    from peft import EvaConfig, LoftQConfig, LoraConfig

    init = settings["init"]
    more = {}
    if init == "eva":
        more["eva_config"] = EvaConfig()
    if init == "loftq":
        more["loftq_config"] = LoftQConfig(loftq_bits=4)
    return LoraConfig(
        task_type=kinds.of(model.config).task_type,
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
    """Return `model` with a new adapter, ready to be trained.

    settings: the section `finetune`; quantize: None, 4bit or 8bit, as the base was loaded; train: the training
    examples, which the EVA initialization reads.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    checkpointing = checkpoints_activations(model, settings)
    if quantize:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        # With frozen embeddings the inputs of the first checkpointed block need no gradient, and without this
        # reentrant checkpointing would cut the gradient off there.
        model.enable_input_require_grads()
    lora = settings["lora"]
    try:
        model = get_peft_model(model, lora_config(model, lora))
    except (ValueError, NotImplementedError, ImportError, AssertionError) as error:
        raise SettingsError(f"finetune.lora: peft rejects these settings: {error}") from error
    _sort_sets(model.peft_config["default"])
    if lora["init"] == "eva":
        _initialize_by_activations(model, train)
    return model


def _sort_sets(config):
    """Sort the values that peft keeps as sets, so that every process writes the same adapter_config.json.

    Sets of strings have another order in each process. The adapter's fingerprint, by which evaluations recognize it,
    would change whenever a training is restored.
    """
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def _initialize_by_activations(model, train):
    """Initialize by EVA: along the directions in which the layers' inputs vary most on the training data."""
    from peft import initialize_lora_eva_weights

    device, kind = next(model.parameters()).device, kinds.of(model.config)
    examples = sorted(train[:EVA_ROWS], key=kind.length)
    parts = [examples[start : start + EVA_BATCH] for start in range(0, len(examples), EVA_BATCH)]
    batches = [kind.inputs(part, device) for part in parts]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def counts(model):
    """Return (trainable parameters, all parameters), both with those of the adapter."""
    return model.get_nb_trainable_parameters()


def remember(model, example, settings, output):
    """Save the untrained adapter if `save` needs it for the conversion to plain LoRA; return its folder, or None."""
    if not settings["lora"]["init"].startswith(MUTATING):
        return None
    folder = output / "initial_adapter"  # peft uses the name as a module name, which must not contain a dot or a dash
    initial = model.peft_config["default"].init_lora_weights
    # peft must load this adapter as it is saved, and not run the initialization again
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder)
    model.peft_config["default"].init_lora_weights = initial
    return folder


def check_acts(model, example, initial=None):
    """Raise CoppiceError if the adapter changes no logit of a training example, or if training did not change it.

    initial: the folder of the untrained adapter, for initializations whose adapter is not zero before training.
    """
    import torch

    kind = kinds.of(model.config)
    inputs = kind.inputs([example], next(model.parameters()).device)
    model.eval()
    with torch.no_grad():
        adapted = kind.outputs(model, inputs)
        with model.disable_adapter():
            plain = kind.outputs(model, inputs)
    if torch.equal(adapted, plain) or (initial and _unchanged(model, initial)):
        raise CoppiceError(
            "finetune: the trained adapter changes no logit of a training example. Check finetune.lora and "
            "finetune.learning_rate."
        )


def _unchanged(model, initial):
    from peft import get_peft_model_state_dict, load_peft_weights

    before = load_peft_weights(str(initial), device="cpu")
    return all(before[name].equal(tensor.cpu()) for name, tensor in get_peft_model_state_dict(model).items())


def restore(model, checkpoint, device):
    """Load the adapter in the folder `checkpoint` into `model`."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device=str(device)))


def save(model, tokenizer, output, initial=None, source=None):
    """Write the adapter and the tokenizer to `output`, replacing older files only once the new ones are complete.

    initial: the folder of the untrained adapter, if its initialization changed the base weights; peft then writes the
    difference to it, as a plain LoRA adapter for the unchanged base.
    """
    partial = output / f"{disks.partial_name()}adapter"
    options = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    model.save_pretrained(partial, **options)
    tokenizer.save_pretrained(partial)
    records.move_in(partial, output)


def checkpoints_activations(model, settings):
    """Return whether to recompute activations in the backward pass.

    The setting `gradient_checkpointing` decides; if it is null, activations are recomputed if they would take more than
    80 % of the free GPU memory, by the estimate of `estimates.kept_values`.
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
    tokens = settings["micro_batch_size"] * settings["data"]["cutoff_len"]
    needed = tokens * config.num_hidden_layers * widths * next(model.parameters()).element_size()
    free, _ = torch.cuda.mem_get_info()
    if needed > 0.8 * free:
        logger.info(
            "gradient checkpointing is on: activations would take %.1f of %.1f GB of free memory",
            needed / 1e9,
            free / 1e9,
        )
    return needed > 0.8 * free
