"""The zero-shot engine as an lm-eval model: the harness's HF backend with log-likelihoods from a prefix tree.

Tokenization, chat templates and generation are inherited from `HFLM`, so requests are the same token for token (see
`merged_tokens` for the one exception, which a study must ask for). Only the computation of log-likelihoods differs.
Importing this module registers the model with lm-eval as `coppice`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from lm_eval import utils
from lm_eval.api.registry import register_model

from coppice import models
from coppice.core.errors import SettingsError, nearest
from coppice.models import kinds

from .merged_tokens import CheckedLM

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from coppice.models.kinds import Fallback, LoadedModel

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (its texts, context ids, continuation ids)

logger = logging.getLogger("coppice.zero_shot")

# The options of HFLM that apply to a model that is already loaded. For such a model HFLM ignores all others without a
# word, so a mistyped option would change nothing; this class rejects them.
HARNESS_OPTIONS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


@dataclass(frozen=True)
class Loading:
    """How `PrefixTreeLM` loads the folder of a checkpoint: the options that lm-eval passes by these names."""

    peft: str | None = None
    """Folder of an adapter to put on the checkpoint."""
    dtype: str | None = None
    """Name of a torch dtype, or "auto" for the checkpoint's. None is bfloat16 on a GPU and float32 elsewhere."""
    device: str | None = None
    """Device to move the model to, if this machine has it."""
    quantize: str | None = None
    """How to quantize the weights: 8bit, 4bit, or None for not at all."""
    trust_remote_code: bool = False
    """Whether to run code that comes with the checkpoint."""
    device_map: str | None = None
    """Where transformers puts the parts of the model."""

    def load(self, folder: str) -> LoadedModel:
        """Return the model in `folder`."""
        dtype = _dtype_name(folder, self.dtype)
        source = models.Source(folder, dtype, self.quantize, self.trust_remote_code, self.device_map)
        model = models.load(source, self.peft)
        # A quantized or distributed model was placed on its devices when it was loaded and cannot be moved.
        movable = _exists(self.device) and not (self.quantize or self.device_map)
        return model.to(self.device) if movable else model


@register_model("coppice")
class PrefixTreeLM(CheckedLM):
    """A causal LM for lm-eval that scores all choices of all items as one prefix tree.

    Attributes:
        shares_prefixes: True if the prefix tree is exact for the model; if not, HFLM scores it.
        fallback: why it does not, or None.
        on_merged_tokens, merged, warnings: as in `CheckedLM`.

    Args:
        pretrained: a loaded model, or the folder of a checkpoint.
        tokenizer: a tokenizer or its folder; by default the one in the checkpoint's folder.
        batch_size: batch size of generation; scoring chooses its own.
        max_batch_size: the largest batch size of generation, if batch_size is "auto".
        options: the fields of `Loading`, and options of HFLM, see `HARNESS_OPTIONS`.

    Raises:
        SettingsError: an option is unknown.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **options: object,
    ) -> None:
        """Take a model or load one, and find out whether it takes the prefix tree."""
        given = {field.name: options.pop(field.name) for field in fields(Loading) if field.name in options}
        loading = Loading(**given)
        for name in options:
            if name not in HARNESS_OPTIONS:
                raise SettingsError(
                    f"model_args: unknown option '{name}'; besides its own, this model takes "
                    f"{', '.join(HARNESS_OPTIONS)}{nearest(name, HARNESS_OPTIONS)}"
                )
        if isinstance(pretrained, str):
            # Load the model here instead of in HFLM, so that odd-shaped checkpoints and adapters load as in a study.
            tokenizer = tokenizer or pretrained
            pretrained = loading.load(pretrained)
        if isinstance(tokenizer, str):
            tokenizer = models.load_tokenizer(tokenizer, loading.trust_remote_code)
        super().__init__(
            pretrained=pretrained,
            backend="causal",  # the prefix tree serves decoder-only models, so HFLM need not guess
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **options,
        )
        found = kinds.of(self.model.config).scorer(self.model, self.mixed_precision_dtype)
        self.fallback = found if isinstance(found, kinds.Fallback) else None
        self.shares_prefixes = self.fallback is None
        if self.fallback:
            self._warn_of(self.fallback)
        else:
            self._scorer = found
        if (self.fallback or found).alone:
            self.batch_size_per_gpu = 1  # of generation, and of scoring by the harness's backend

    def _warn_of(self, fallback: Fallback) -> None:
        one = ", one text at a time" if fallback.alone else ""
        self.warnings.append(f"lm-eval's own backend scored the tasks{one}, not the prefix tree: {fallback.reason}")
        logger.warning("%s: %s", type(self.model).__name__, self.warnings[-1])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts over the harness's disjoint windows."""
        # HFLM scores a batch of windows at a time; collect all of them, so that they form one prefix tree.
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            # The key is None because a window is not a request, so `_loglikelihood_tokens` must not cache its answer.
            found = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows.extend(found)
            counts.append(len(found))
        # The scores come in the order of the windows; each text takes as many as it has windows.
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm) if windows else ())
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score (key, context ids, continuation ids) as a prefix tree. HFLM's other methods end up here."""
        if not self.shares_prefixes:
            self.fallback.forget()
        if not self.shares_prefixes or not requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        for request in requests:
            self._check(*request)
        # As in HFLM: keep the last `longest + 1` tokens, the last of which is predicted but is not an input.
        longest = self.max_length
        cut = [((context + ending)[-(longest + 1) :][:-1], ending) for _, context, ending in requests]
        if truncated := sum(len(context) + len(ending) > longest + 1 for _, context, ending in requests):
            logger.warning(
                "%d requests are longer than the model's context of %d tokens and lose their beginning",
                truncated,
                longest,
            )
        answers = self._scorer.score(cut, quiet=disable_tqdm)
        # As in HFLM: hand every answer to lm-eval's request cache, which a model must fill itself.
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers


def _dtype_name(folder: str, dtype: str | None) -> str | None:
    """Return the name of the dtype to load a checkpoint in, or None for the default of `coppice.models`."""
    if dtype != "auto":
        return dtype
    from transformers import AutoConfig

    # `coppice.models` does not know "auto": look up the dtype in the checkpoint's configuration.
    found = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    return None if found is None else str(found).removeprefix("torch.")


def _exists(device: str | None) -> bool:
    """Return True if a device is given and this machine has it: lm-eval's command line asks for cuda:0 by default."""
    return bool(device) and (torch.cuda.is_available() or not str(device).startswith("cuda"))
