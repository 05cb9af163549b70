"""Trains the tiny models of the miniature study: a base model of each family, and its instruct version.

Hidden matrices are trained by Muon, the rest by AdamW: in the same time, on models this small, far better than AdamW
alone. The number of steps is fixed, so that a slow machine trains the same model, only later.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coppice import data
from coppice.core import records

from .tiny_models import RECIPES, Recipe, sizes
from .tokenizer import CHAT_TEMPLATE, train_tokenizer

logger = logging.getLogger("coppice.miniature")

_TOKENIZER_DOCUMENTS = 4000
_LOG_EVERY = 50
# Rows are halved until the last part of a training: short rows train faster, and long positions are learnt quickly.
_LONG_PART = 0.2


@dataclass(frozen=True)
class Text:
    """What a tiny model is trained on: short documents, long running texts, and instructions for an instruct model."""

    documents: list[str]
    running: list[str]
    instructions: list[dict]

    @classmethod
    def of_records(cls, corpus: list[str], instructions: str | None = None) -> "Text":
        """The train rows of prepared data sets, by their records: generated documents, else one running text each."""
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
) -> dict:
    """Trains a base model of `family` with its own tokenizer on `text`, and saves it as a checkpoint folder.

    `steps` takes the place of the recipe's number of optimizer steps, `context` that of its length in tokens. Returns
    the facts of the training: steps, tokens, the mean loss of the last steps in nats a token, seconds.
    """
    import torch

    torch.manual_seed(seed)
    recipe, rng = _recipe(family, context), random.Random(f"base {family} {seed}")
    sample = [*text.documents[:_TOKENIZER_DOCUMENTS], *(running[:200_000] for running in text.running)]
    tokenizer = train_tokenizer(sample, recipe.vocab_size, recipe.context)
    model = _new_model(family, recipe, tokenizer)
    tokenizer = _as_users_get_it(tokenizer, model, output)
    rows = _packed(tokenizer, text.documents, recipe.context, rng)
    for running in text.running:
        rows += _windows(tokenizer, running, recipe.context)
    facts = _train(model, _batches(rows, recipe, rng), steps or recipe.steps, recipe, 1.0, logger.info)
    _save(model, tokenizer, output)
    return {"family": family, "variant": "base", **facts}


def train_instruct(
    family: str, base: Path, text: Text, output: Path, seed: int, steps: int | None = None, context: int | None = None
) -> dict:
    """Fine-tunes a base checkpoint on the instructions in its chat template, mixed with as much of the other text.

    The mixture lets the model keep what it knows. `steps` is the base's number of steps, of which this takes a share.
    Returns the same facts as `train_base`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    recipe, rng = _recipe(family, context), random.Random(f"instruct {family} {seed}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chats = [_chat(tokenizer, row) for row in text.instructions]
    documents = rng.sample(text.documents, min(len(chats), len(text.documents)))
    rows = _packed(tokenizer, chats + documents, recipe.context, rng)
    for running in text.running:
        rows += _windows(tokenizer, running, recipe.context)[::4]
    share = recipe.instruct_steps / recipe.steps
    steps = max(1, round(steps * share)) if steps else recipe.instruct_steps
    facts = _train(model, _batches(rows, recipe, rng), steps, recipe, recipe.instruct_scale, logger.info)
    _save(model, tokenizer, output)
    return {"family": family, "variant": "instruct", **facts}


def _recipe(family: str, context: int | None) -> Recipe:
    return replace(RECIPES[family], **({"context": context} if context else {}))


def _as_users_get_it(tokenizer, model, output: Path):
    """The tokenizer that `AutoTokenizer` makes of the saved one: for Qwen2 it splits text in its own way.

    Trained with the other one, the model would see other tokens in every evaluation than in its training.
    """
    from transformers import AutoTokenizer

    model.config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return AutoTokenizer.from_pretrained(output)


def _chat(tokenizer, row: dict) -> str:
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def _new_model(family: str, recipe: Recipe, tokenizer):
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
        **sizes(recipe) | {"vocab_size": len(tokenizer)},
        max_position_embeddings=recipe.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    return model_class(config)


def _packed(tokenizer, documents: Iterable[str], context: int, rng: random.Random) -> list[list[int]]:
    """Rows that start at the start of a document; what does not fit into a row is cut off."""
    documents = list(documents)
    ids = tokenizer(documents)["input_ids"] if documents else []  # the tokenizer takes no empty list
    rng.shuffle(ids)
    rows, row = [], []
    for document in ids:
        row += [*document, tokenizer.eos_token_id]
        if len(row) >= context:
            rows.append(row[:context])
            row = []
    return rows


def _windows(tokenizer, text: str, context: int) -> list[list[int]]:
    """Running text cut into windows, as perplexity is measured."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]


def _batches(rows: list[list[int]], recipe: Recipe, rng: random.Random) -> Iterator[list[list[int]]]:
    """Endless batches; every row once before any comes again."""
    size = max(1, recipe.step_tokens // recipe.context)
    while True:
        rng.shuffle(rows)
        for i in range(0, len(rows) - size + 1, size):
            yield rows[i : i + size]


def _optimizers(model, recipe: Recipe, scale: float) -> list:
    import torch

    from .optimizer import Muon

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.muon_rate * scale),
        torch.optim.AdamW(others, lr=recipe.adamw_rate * scale, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _train(model, batches: Iterator, steps: int, recipe: Recipe, scale: float, log: Callable[[str], Any]) -> dict:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizers = _optimizers(model, recipe, scale)
    schedules = [get_cosine_schedule_with_warmup(o, min(20, steps // 5), steps) for o in optimizers]
    model.train()
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        ids = torch.tensor(next(batches))
        if step <= steps * (1 - _LONG_PART):
            ids = ids.view(-1, recipe.context // 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % _LOG_EVERY == 0 or step == steps:
            recent, seconds = losses[-_LOG_EVERY:], time.perf_counter() - start
            log(
                f"step {step}/{steps}, loss {sum(recent) / len(recent):.3f}, "
                f"{step * ids.numel() / seconds:.0f} tokens/s, {seconds / step * (steps - step):.0f} s left"
            )
    recent = losses[-_LOG_EVERY:]
    return {
        "steps": steps,
        "tokens": steps * max(recipe.step_tokens, recipe.context),
        "final_loss": sum(recent) / len(recent),
        "seconds": time.perf_counter() - start,
    }


def _save(model, tokenizer, output: Path) -> None:
    model.eval()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    records.as_new_files(output)
