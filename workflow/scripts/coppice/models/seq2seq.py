"""Sequence-to-sequence models (encoder-decoders): T5, FLAN-T5, mT5, BART, mBART and whatever else of text loads alike.

`seq2seq_batches` has the engine of their training.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.errors import SettingsError

from . import dimensions, generating, seq2seq_towers
from .kinds import ModelKind
from .tokenizing import check_end

if TYPE_CHECKING:
    from types import SimpleNamespace

    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from transformers.utils import ModelOutput

    from .kinds import Decoding, Engine, Example, Inputs, LoadedModel
    from .readers import Reader
    from .rows import Row
    from .towers import Anatomy, Tower

PROBES, PROBE_TOKENS = 4, 64  # random sources and targets, and their length, on which logits are compared
SELF = ("SelfAttention", "self_attn")  # T5's names and BART's
CROSS = ("EncDecAttention", "encoder_attn")
RELATIVE_LENGTH = 512  # tokens that T5 was trained on; its positions are relative and have no end


class Seq2Seq(ModelKind):
    """The kind of encoder-decoders, which read a source text and write a target text."""

    name = "seq2seq"
    pipeline = "text2text-generation"
    noun = "a sequence-to-sequence model"
    distills = True
    prompts = ("none", "alpaca")
    tower_names = pruned_towers = ("encoder", "decoder")
    row_kinds = ("pair", "caption", "instruction", "completion")
    task_type = "SEQ_2_SEQ_LM"
    prunable = seq2seq_towers.T5 + seq2seq_towers.BART
    prunes_together = True
    adapter_groups: Mapping[str, tuple[str, ...]] = {
        "attention": SELF + CROSS,
        "self-attention": SELF,
        "cross-attention": CROSS,
        "mlp": ("DenseReluDense", "fc1", "fc2"),
    }
    evaluators = ("answers", "merge", "cost")
    validators = generating.VALIDATORS

    def fits(self, config: PretrainedConfig | SimpleNamespace) -> bool:
        """Return whether the model has an encoder and a decoder."""
        return bool(getattr(config, "is_encoder_decoder", False))

    def auto_class(self) -> type:
        """Return AutoModelForSeq2SeqLM."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def context_length(self, config: PretrainedConfig) -> int | None:
        """Return the number of positions, of sources and of targets; T5's training length if it has none."""
        relative = RELATIVE_LENGTH if hasattr(config, "relative_attention_num_buckets") else None
        return dimensions.of(config).context_length or relative

    def anatomies(self, config: PretrainedConfig) -> tuple[Anatomy, ...]:
        """Return the encoder and the decoder of the architectures in `prunable`."""
        return seq2seq_towers.anatomies(config)

    def towers(self, model: LoadedModel) -> list[Tower]:
        """Return the encoder and the decoder."""
        return seq2seq_towers.towers(model, self.anatomies(model.config))

    def tower_of(self, layer: str) -> str:
        """Return the stack; the decoder's has the cross-attention and the output layer."""
        return "encoder" if "encoder" in layer.split(".") else "decoder"

    def examples(self, rows: Sequence[Row], reader: Reader, cutoff: int, train_on_inputs: bool) -> list[list[Example]]:
        """Turn rows into examples {input_ids, labels}: the tokens of the source and those of the target.

        Source and target share `cutoff` tokens. If they have more, the longer one is cut, and the shorter one only if
        it needs more than half. A source keeps the tokenizer's special tokens; a target that is cut does not end, so
        that the model does not learn to stop there.

        Raises:
            SettingsError: The source is to be learned too, or the tokenizer has no end-of-sequence token.
        """
        if train_on_inputs:
            raise SettingsError(
                f"finetune.data.train_on_inputs: {self.noun} reads its inputs and writes only the answer, so it cannot "
                "learn them. Set it to false."
            )
        check_end(reader.tokenizer, "the model")
        usable = [row for row in rows if row.segments]
        sources = _sources(reader.tokenizer, [row.question for row in usable], None)
        targets = _targets(reader.tokenizer, [row.segments[-1].text for row in usable])
        pairs = iter(zip(sources, targets, strict=True))
        return [
            [_example(reader.tokenizer, row.question, *next(pairs), cutoff)] if row.segments else [] for row in rows
        ]

    def length(self, example: Example) -> int:
        """Return the number of tokens of source and target."""
        return len(example["input_ids"]) + len(example["labels"])

    def targets(self, examples: Sequence[Example]) -> int:
        """Return the number of target tokens."""
        return sum(len(example["labels"]) for example in examples)

    def sort_key(self, example: Example) -> list[int]:
        """Return the lengths of source and target."""
        from . import seq2seq_batches

        return seq2seq_batches.sort_key(example)

    def engine(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> Engine:
        """Return the engine that sorts by length."""
        from . import seq2seq_batches

        return seq2seq_batches.Engine(model, token_limit, arrangement)

    def inputs(self, examples: Sequence[Example], device: torch.device) -> Inputs:
        """Return the ids of sources with their mask, and the labels, from which a model makes the decoder's inputs."""
        from . import seq2seq_batches

        return {name: tensor.to(device) for name, tensor in seq2seq_batches.padded(examples).items()}

    def answers(self, model: LoadedModel, reader: Reader, rows: Sequence[Row], decoding: Decoding) -> list[str]:
        """Return what the model writes for each row's source."""
        from . import output_head

        plain, tokenizer = output_head.causal_lm(model), reader.tokenizer
        device = plain.get_input_embeddings().weight.device
        sources = _sources(tokenizer, [row.question for row in rows], self.context_length(plain.config))

        def generate(batch: list[int]) -> list[str]:
            inputs = tokenizer.pad({"input_ids": [sources[index] for index in batch]}, return_tensors="pt").to(device)
            written = plain.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **decoding.options()
            )
            return tokenizer.batch_decode(written, skip_special_tokens=True)

        return generating.in_batches([len(source) for source in sources], decoding, generate, device)

    def calibration(self, examples: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
        """Return batches {input_ids, labels} of examples with equal lengths of source and target."""
        import torch

        keys = ("input_ids", "labels")
        alike = itertools.groupby(sorted(examples, key=self.sort_key), key=self.sort_key)
        groups = (list(group) for _, group in alike)
        return [{key: torch.tensor([example[key] for example in group]) for key in keys} for group in groups]

    def timed_inputs(self, model: LoadedModel, ids: torch.Tensor, before: ModelOutput | None) -> Inputs:
        """Return sources with the first token of their targets, or the next tokens of targets."""
        if before is None:
            return {"input_ids": ids, "decoder_input_ids": ids[:, :1]}  # any token takes the same time
        memory = (before.encoder_last_hidden_state,)
        return {"encoder_outputs": memory, "decoder_input_ids": ids, "past_key_values": before.past_key_values}

    def probes(self, model: LoadedModel) -> list[Inputs]:
        """Return random tokens, for the encoder and for the decoder."""
        import torch

        embeddings = model.get_input_embeddings().weight
        length = min(PROBE_TOKENS, self.context_length(model.config) or PROBE_TOKENS)
        ids = torch.randint(embeddings.shape[0], (PROBES, 2, length), generator=torch.Generator().manual_seed(0))
        ids = ids.to(embeddings.device)
        return [{"input_ids": source[None], "decoder_input_ids": target[None]} for source, target in ids]

    def outputs(self, model: LoadedModel, inputs: Inputs) -> torch.Tensor:
        """Return the logits of the decoder."""
        return model(**inputs, use_cache=False).logits


def _sources(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int | None) -> list[list[int]]:
    """Return the ids of sources with special tokens, cut before those at the end if they exceed `length`."""
    options = {"truncation": True, "max_length": length} if length else {"verbose": False}
    return tokenizer(list(texts), **options)["input_ids"] if texts else []


def _targets(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of targets, each with an end-of-sequence token."""
    if not texts:
        return []
    end = tokenizer.eos_token_id
    found = tokenizer(text_target=list(texts), verbose=False)["input_ids"]
    # mBART puts the language's token after the end
    return [ids if end in ids[-2:] else [*ids, end] for ids in found]


def _example(
    tokenizer: PreTrainedTokenizerBase, question: str, source: list[int], target: list[int], cutoff: int
) -> Example:
    """Return the example of a source and a target, cut to `cutoff` tokens."""
    room = max(cutoff // 2, cutoff - len(source))
    if len(target) > room:
        # mBART makes the first token that its decoder reads of the last one of the target, so that must stay
        target = target[:room] if target[-1] == tokenizer.eos_token_id else [*target[: room - 1], target[-1]]
    if len(source) > cutoff - len(target):
        (source,) = _sources(tokenizer, [question], cutoff - len(target))
    return {"input_ids": source, "labels": target}


KIND = Seq2Seq()
