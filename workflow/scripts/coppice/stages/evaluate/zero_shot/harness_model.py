"""The zero-shot engine as a language model of lm-eval: its HF backend with log-likelihoods from a prefix tree.

Tokenisation, chat templates and generation are the harness's own (`HFLM`), so that requests are the same to the token;
only how their log-likelihoods come about differs. Importing this module registers the model as `coppice`.
"""

import logging

import torch
from lm_eval import utils
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix

from coppice import models
from coppice.core.errors import DataError, SettingsError, nearest

from .packed import Packer

logger = logging.getLogger("coppice.zero_shot")

# Options of HFLM that mean something for a model that is loaded already
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


@register_model("coppice")
class PrefixTreeLM(HFLM):
    """A causal LM for lm-eval that scores all choices of all items as one prefix tree.

    pretrained: a loaded model (then `tokenizer` is its tokenizer), or the folder of a checkpoint, loaded by
    `coppice.models` with `peft`, an adapter's folder, on it. dtype: a torch dtype's name, "auto" for the checkpoint's;
    the default is bfloat16 on a GPU and float32 elsewhere. quantize: "8bit" or "4bit". The batch sizes are those of
    generation; scoring finds its own. `shares_prefixes` says whether the model takes the tree. Raises SettingsError for
    an option that neither this class nor HFLM knows.
    """

    def __init__(
        self,
        pretrained,
        tokenizer=None,
        peft=None,
        dtype=None,
        device=None,
        quantize=None,
        trust_remote_code=False,
        device_map=None,
        batch_size=1,
        max_batch_size=64,
        **options,
    ):
        for name in options:
            if name not in HARNESS_OPTIONS:
                raise SettingsError(f"model_args: no option '{name}'{nearest(name, HARNESS_OPTIONS)}")
        if isinstance(pretrained, str):
            source = models.Source(pretrained, _dtype_name(pretrained, dtype), quantize, trust_remote_code, device_map)
            folder, pretrained = pretrained, models.load(source, peft)
            if _is_here(device) and not (quantize or device_map):
                pretrained = pretrained.to(device)
            tokenizer = tokenizer or folder
        if isinstance(tokenizer, str):
            tokenizer = models.load_tokenizer(tokenizer, trust_remote_code)
        self._encoded = {}
        super().__init__(
            pretrained=pretrained,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **options,
        )
        self._packer = Packer(self.model, self.mixed_precision_dtype)
        self.shares_prefixes = self._packer.usable()
        if not self.shares_prefixes:
            logger.warning(
                "%s cannot take a prefix tree's attention mask: the harness's own backend scores it",
                type(self.model).__name__,
            )

    def loglikelihood(self, requests, disable_tqdm=False):
        """(log-likelihood, is the greedy continuation) of each (context, continuation), as HFLM encodes them."""
        self._encoded = self._encode_together({text for request in requests for text in _texts(*request.args)})
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded = {}

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **options):
        """Token ids of a text; from what was encoded together where it was."""
        if add_special_tokens is None and not left_truncate_len and string in self._encoded:
            return list(self._encoded[string])
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)

    def _encode_together(self, texts):
        """Token ids of many texts, by text: one call of the tokenizer instead of one for each and each choice.

        Those that begin with the BOS token by themselves are left to `HFLM.tok_encode`, which treats them apart.
        """
        prefix = self.tokenizer.decode(self.prefix_token_id)
        texts = sorted(text for text in texts if text and not has_bos_prefix(text, prefix))
        if not texts or not self.tokenizer.is_fast:
            return {}
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        return dict(zip(texts, self.tokenizer(texts, verbose=False, **special)["input_ids"], strict=True))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihood of whole texts, in the harness's disjoint windows; all windows are scored together."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows.extend(found)
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm) if windows else ())
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        for request in requests:
            self._check(*request)
        if not self.shares_prefixes or not requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        longest = self.max_length
        cut = [((context + ending)[-(longest + 1) :][:-1], ending) for _, context, ending in requests]
        if truncated := sum(len(context) + len(ending) > longest + 1 for _, context, ending in requests):
            logger.warning("%d requests are longer than the model's %d tokens: cut on the left", truncated, longest)
        answers = self._packer.score(cut, quiet=disable_tqdm)
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _check(self, key, context, ending):
        """Refuse what has no log-likelihood under this model, naming the request."""
        if context and 0 < len(ending) <= self.max_length:
            return
        text = repr(key[1] if key else ending)[:80]
        if not ending:
            raise DataError(f"the continuation {text} has no tokens after its context; a task's choices need some")
        if not context:
            raise DataError(f"the continuation {text} has no context; the tokenizer gives no token to begin with")
        raise DataError(f"the continuation {text} has {len(ending)} tokens, the model's context is {self.max_length}")


def _texts(context, continuation):
    """What `TemplateLM._encode_pair` encodes for a request: the context without spaces at its end, and the whole."""
    return (context.rstrip(), context + continuation) if context else ()


def _dtype_name(folder, dtype):
    if dtype != "auto":
        return dtype
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    return None if found is None else str(found).removeprefix("torch.")


def _is_here(device):
    """Whether a device was asked for that this machine has: lm-eval's command line asks for cuda:0 by itself."""
    return bool(device) and (torch.cuda.is_available() or not str(device).startswith("cuda"))
