"""Train the tiny causal language models of the text world: a base model of each family, and its instruct version."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coppice import data
from coppice.core import records
from coppice.core.aliases import PathLike, Record

from .pretraining_loop import Rates, train
from .tiny_models import TINY_MODELS, TinyModel, sizes
from .tokenizer import CHAT_TEMPLATE, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_DOCUMENTS = 4000
# Share of the steps, at the end, that use rows of full length. Before, rows are cut in half, because short rows train
# faster and late positions are learned quickly.
_LONG_PART = 0.2


@dataclass(frozen=True)
class Text:
    """The text that a tiny model is trained on: short documents, long running texts, and instructions (if instruct)."""

    documents: list[str]
    running: list[str]
    instructions: list[Record]

    @classmethod
    def of_records(cls, corpus: Iterable[PathLike], instructions: PathLike | None = None) -> Text:
        """Read the train rows of prepared datasets from the paths of their records.

        The rows of `pretraining` are documents; the rows of any other dataset are joined to one running text.
        """
        documents, running = [], []
        for record in corpus:
            rows = data.texts(record, "train")
            if Path(record).parent.name == "pretraining":
                documents += rows
            else:
                running.append((" " if Path(record).parent.name == "ptb" else "\n\n").join(rows))
        rows = data.load(instructions, "train").to_list() if instructions else []
        return cls(documents, running, rows)


def train_base(
    family: str, text: Text, output: Path, seed: int, steps: int | None = None, context: int | None = None
) -> Record:
    """Train a base model with its own tokenizer and save it as a checkpoint folder.

    Args:
        family: a key of `TINY_MODELS`.
        text: the text to train on.
        output: folder to write.
        seed: seed of the weights and of the order of rows.
        steps: optimizer steps, if not those of `TINY_MODELS`.
        context: context length in tokens, if not that of `TINY_MODELS`.

    Returns:
        Facts about the training: family, variant, steps, tokens, final_loss (mean over the last steps, in nats per
        token), seconds.
    """
    import torch

    torch.manual_seed(seed)
    spec, rng = _spec(family, context), random.Random(f"base {family} {seed}")
    sample = [*text.documents[:_TOKENIZER_DOCUMENTS], *(running[:200_000] for running in text.running)]
    tokenizer = train_tokenizer(sample, spec.vocab_size, spec.context)
    model = _new_model(family, spec, tokenizer)
    tokenizer = _as_users_get_it(tokenizer, model, output)
    rows = _packed(tokenizer, text.documents, spec.context, rng)
    for running in text.running:
        rows += _windows(tokenizer, running, spec.context)
    facts = _train(model, _batches(rows, spec, rng), steps or spec.steps, spec)
    _save(model, tokenizer, output)
    return {"family": family, "variant": "base", **facts}


def train_instruct(
    family: str, base: Path, text: Text, output: Path, seed: int, steps: int | None = None, context: int | None = None
) -> Record:
    """Fine-tune a base checkpoint on instructions in its chat template, mixed with documents and running text.

    The mixture keeps the model from forgetting what it learned. The arguments and the result are those of `train_base`,
    except that `base` is the folder of the base checkpoint and `steps` is the base model's number of steps, of which
    this training takes a share.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    spec, rng = _spec(family, context), random.Random(f"instruct {family} {seed}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chats = [_chat(tokenizer, row) for row in text.instructions]
    documents = rng.sample(text.documents, min(len(chats), len(text.documents)))
    rows = _packed(tokenizer, chats + documents, spec.context, rng)
    for running in text.running:
        rows += _windows(tokenizer, running, spec.context)[::4]
    share = spec.instruct_steps / spec.steps
    steps = max(1, round(steps * share)) if steps else spec.instruct_steps
    facts = _train(model, _batches(rows, spec, rng), steps, spec, spec.instruct_scale)
    _save(model, tokenizer, output)
    return {"family": family, "variant": "instruct", **facts}


def _spec(family: str, context: int | None) -> TinyModel:
    return replace(TINY_MODELS[family], **({"context": context} if context else {}))


def _as_users_get_it(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, output: Path
) -> PreTrainedTokenizerBase:
    """Save the tokenizer and load it with `AutoTokenizer`, as users do.

    For Qwen2, `AutoTokenizer` splits text in its own way. Without this, the model would see other tokens in evaluation
    than in training.
    """
    from transformers import AutoTokenizer

    model.config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return AutoTokenizer.from_pretrained(output)


def _chat(tokenizer: PreTrainedTokenizerBase, row: Record) -> str:
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def _new_model(family: str, spec: TinyModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen": (Qwen2Config, Qwen2ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[family]
    config = config_class(
        **sizes(spec) | {"vocab_size": len(tokenizer)},
        max_position_embeddings=spec.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    return model_class(config)


def _packed(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], context: int, rng: random.Random
) -> list[list[int]]:
    """Return rows of `context` tokens that start with a document; the rest of a row's last document is cut off."""
    documents = list(documents)
    ids = tokenizer(documents)["input_ids"] if documents else []  # the tokenizer rejects an empty list
    rng.shuffle(ids)
    rows, row = [], []
    for document in ids:
        row += [*document, tokenizer.eos_token_id]
        if len(row) >= context:
            rows.append(row[:context])
            row = []
    return rows


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> list[list[int]]:
    """Cut running text into windows of `context` tokens, as the perplexity evaluation does."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]


def _batches(rows: list[list[int]], spec: TinyModel, rng: random.Random) -> Iterator[list[list[int]]]:
    """Yield batches without end; every epoch uses each row at most once."""
    size = max(1, spec.step_tokens // spec.context)
    while True:
        rng.shuffle(rows)
        for i in range(0, len(rows) - size + 1, size):
            yield rows[i : i + size]


def _inputs(batches: Iterator[list[list[int]]], steps: int, spec: TinyModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the inputs of each step; all but the last steps have rows of half the length."""
    import torch

    for step in range(1, steps + 1):
        ids = torch.tensor(next(batches))
        if step <= steps * (1 - _LONG_PART):
            ids = ids.view(-1, spec.context // 2)
        yield {"input_ids": ids, "labels": ids}


def _train(
    model: PreTrainedModel, batches: Iterator[list[list[int]]], steps: int, spec: TinyModel, scale: float = 1.0
) -> Record:
    rates = Rates(spec.muon_rate * scale, spec.adamw_rate * scale)
    facts = train(model, _inputs(batches, steps, spec), steps, rates)
    return facts | {"tokens": steps * max(spec.step_tokens, spec.context)}


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    model.eval()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    records.as_new_files(output)
