"""The harness's HF backend, with every request checked: what has no log-likelihood is an error that names the item.

A tokenizer may merge the end of a prompt with the beginning of its answer. The harness then scores what comes after as
many tokens as the prompt alone has: less than the answer, or nothing at all. `evaluate.zero_shot.on_merged_tokens` says
what happens instead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix

from coppice.core.errors import DataError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("coppice.zero_shot")

Policy = Literal["error", "drop", "score-whole"]
SHOWN = 60  # characters of a text in a message


class Unscorable(Exception):
    """Items whose answers have no tokens of their own. `items` are their places among the task's items."""

    def __init__(self, items: set[int]) -> None:
        """Take the places of the items."""
        super().__init__(f"{len(items)} items have answers that merge with their prompts")
        self.items = items


@dataclass
class Encoded:
    """The requests of a call as tokens.

    Attributes:
        pairs: (context, continuation) -> their tokens.
        merged: places of the items with a merged answer.
    """

    pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = field(default_factory=dict)
    merged: set[int] = field(default_factory=set)


class CheckedLM(HFLM):
    """The harness's HF backend for a model that is already loaded, with every request checked.

    Attributes:
        on_merged_tokens: what to do if tokens merge across the join of prompt and answer.
        merged: places of the items of the last call in which they do.
        warnings: what a reader of the scores must know, in sentences.
    """

    def __init__(self, **options: object) -> None:
        """Take the options of HFLM, whose `softmax_dtype` is float32 if it is not given."""
        self.on_merged_tokens: Policy = "error"
        self.merged: set[int] = set()
        self.warnings: list[str] = []
        self._tokens: dict[str, list[int]] = {}
        self._pairs: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        # By default, HFLM takes the log-softmax in the model's dtype. In bfloat16 this rounds log-likelihoods more than
        # the model's own arithmetic does.
        super().__init__(**{"softmax_dtype": "float32"} | options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, True if it is the greedy continuation) of each (context, continuation)."""
        # HFLM encodes each request by itself, through `tok_encode`. Encode all texts in one call first and let
        # `tok_encode` look them up; forget them afterwards, because they are only needed here.
        self._tokens = self._encode_together({text for request in requests for text in _texts(*request.args)})
        try:
            encoded = self._encode(requests)
            self._pairs, self.merged = encoded.pairs, encoded.merged
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._tokens, self._pairs = {}, {}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: object,
    ) -> list[int]:
        """Return the token ids of a text, from `_tokens` if the text was encoded with the same options."""
        if add_special_tokens is None and not left_truncate_len and string in self._tokens:
            return list(self._tokens[string])  # a copy: the harness may change the list
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._pairs.get((context, continuation)) or super()._encode_pair(context, continuation)

    def _encode(self, requests: Sequence[Instance]) -> Encoded:
        """Return the tokens of requests, split between prompt and answer as the policy wants.

        Raises:
            DataError: an answer has no tokens, and the policy is "error".
            Unscorable: tokens merge, and the policy is "drop".
        """
        found, alike = Encoded(), {}
        for request in requests:
            context, continuation = request.args
            if not context or (context, continuation) in found.pairs:  # without a prompt, there is nothing to merge
                continue
            prompt, whole = self.tok_encode(context.rstrip()), self.tok_encode(context + continuation)
            found.pairs[context, continuation] = prompt, whole[len(prompt) :]
            shared = _common_prefix(prompt, whole)
            if shared == len(prompt) or not continuation:
                continue
            if len(whole) <= len(prompt) and self.on_merged_tokens == "error":
                raise DataError(_message(request))
            found.merged.add(_place(request))
            alike[context] = min(shared, alike.get(context, shared))
        if found.merged and self.on_merged_tokens == "drop":
            raise Unscorable(found.merged)
        if self.on_merged_tokens == "score-whole":
            # All answers of a prompt begin at the same token, or their log-likelihoods would cover different texts.
            for context, continuation in found.pairs:
                if context in alike:
                    whole, start = self.tok_encode(context + continuation), alike[context]
                    found.pairs[context, continuation] = whole[:start] or [self.prefix_token_id], whole[start:]
        return found

    def _encode_together(self, texts: set[str]) -> dict[str, list[int]]:
        """Return text -> token ids, from one call of the tokenizer instead of several per request.

        Texts that already begin with the BOS token are left to `HFLM.tok_encode`, which then adds no second one.
        """
        prefix = self.tokenizer.decode(self.prefix_token_id)
        asked = sorted(text for text in texts if text and not has_bos_prefix(text, prefix))
        if not asked or not self.tokenizer.is_fast:  # a slow tokenizer encodes one text at a time in any case
            return {}
        # As in HFLM: unless the option is set, the tokenizer decides about special tokens.
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        return dict(zip(asked, self.tokenizer(asked, verbose=False, **special)["input_ids"], strict=True))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score (key, context ids, continuation ids) after a check of each. HFLM's other methods end up here."""
        for request in requests:
            self._check(*request)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _check(self, key: tuple[str, str] | None, context: list[int], ending: list[int]) -> None:
        """Raise DataError, naming the request, if it has no log-likelihood under this model."""
        if context and 0 < len(ending) <= self.max_length:
            return
        text = repr(key[1] if key else ending)[:80]
        if not ending:
            raise DataError(
                f"the continuation {text} has no tokens after its context. Correct the choices in the task's rows."
            )
        if not context:
            raise DataError(
                f"the continuation {text} has no context, and the tokenizer adds no token to begin with. Give the item "
                "a context."
            )
        raise DataError(
            f"the continuation {text} has {len(ending)} tokens, but the model's context is {self.max_length}. Shorten "
            "it or leave the row out."
        )


def warning_of(policy: Policy, task: str, merged: int, items: int) -> str:
    """Return what a record and every report say about `merged` of a task's `items`."""
    where = f"{task}: in {merged} of {items} items the tokenizer merges the end of the prompt with the answer"
    return {
        "error": f"{where}; as in lm-eval, the answer is scored without its first characters",
        "drop": f"{where}; these items were left out",
        "score-whole": f"{where}; there the answers are scored from that token on",
    }[policy]


def _message(request: Instance) -> str:
    context, continuation = request.args
    task = f"task {request.task_name}, " if request.task_name else ""
    end = context if len(context) <= SHOWN else f"...{context[-SHOWN:]}"
    return (
        f"{task}item {_place(request)} (from 0): the tokenizer merges the end of the prompt {end!r} with the whole "
        f"answer {continuation[:SHOWN]!r}, so no token of the answer is left to score. Let the answer begin with a "
        'space (target_delimiter: " " in the task\'s definition), or set evaluate.zero_shot.on_merged_tokens to drop '
        "(leave such items out) or to score-whole (score the merged token with the answer)."
    )


def _place(request: Instance) -> int:
    return request.idx if request.doc_id is None else request.doc_id


def _common_prefix(first: list[int], second: list[int]) -> int:
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _texts(context: str, continuation: str) -> tuple[str, ...]:
    """Return the two texts that are encoded for a request: the context without trailing spaces, and both."""
    # For an empty context, HFLM encodes the continuation with other options, so encoding it here would be useless.
    return (context.rstrip(), context + continuation) if context else ()
