"""From a row of a data set to the text that a model learns: what it is shown, and what it is to say.

The same form serves a question that a model is asked: see `asked`.

Four kinds of rows are known by their columns: chats (`messages`), instructions (`instruction`, `input`, `output`),
completions (`prompt`, `completion`) and plain text (`text`). The Alpaca prompt is that of Stanford Alpaca (Taori et al.
2023), which LLM-Pruner's recovery uses too.
"""

from dataclasses import dataclass

from coppice.core.errors import DataError, SettingsError

KINDS = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Segment:
    """A piece of an example: `text`, and whether the model learns to say it."""

    text: str
    learnt: bool


def kind_of(columns, dataset):
    """The kind of a data set's rows by its `columns`; DataError where none fits."""
    for kind, needed in KINDS.items():
        if set(needed) <= set(columns):
            return kind
    known = "; ".join(f"{' and '.join(needed)} ({kind})" for kind, needed in KINDS.items())
    raise DataError(
        f"datasets.{dataset}: fine-tuning needs the columns {known}; it has {', '.join(columns)}; "
        f"map them with datasets.{dataset}.columns"
    )


class Formatter:
    """Turns rows of one `kind` into segments, in the prompt format `prompt`: alpaca, chat or none.

    `add_special_tokens` says whether the tokenizer's own (BOS) go before the first segment: a chat template has them
    already. `ends` says whether an example ends with EOS: the turns of a chat template end by themselves.
    """

    def __init__(self, kind, prompt, tokenizer):
        if prompt == "chat" and not tokenizer.chat_template:
            raise SettingsError(
                "prompt: chat was asked for, but the model's tokenizer has no chat template; set models.X.prompt to "
                "alpaca or none"
            )
        self.kind, self.prompt, self.tokenizer = kind, prompt, tokenizer
        self.chat = prompt == "chat" and kind != "text"
        self.add_special_tokens = not self.chat

    def __call__(self, row):
        """(segments, whether EOS ends them); no segments for a row without anything to say."""
        if self.kind == "text":
            return [Segment(row["text"], True)] if (row["text"] or "").strip() else [], True
        turns = _turns(row, self.kind)
        if not turns or turns[-1]["role"] != "assistant" or not (turns[-1]["content"] or "").strip():
            return [], True
        return self._chat(turns) if self.chat else (self._plain(row, turns), True)

    def _plain(self, row, turns):
        *before, last = turns
        if self.kind == "completion":
            return [Segment(row["prompt"] or "", False), Segment(last["content"], True)]
        if self.prompt == "alpaca" and self.kind == "instruction":
            extra = row.get("input") or ""
            template = ALPACA_WITH_INPUT if extra else ALPACA
            asked = template.format(instruction=row["instruction"] or "", input=extra)
        else:
            asked = "\n\n".join(turn["content"] for turn in before)
            asked = ALPACA.format(instruction=asked) if self.prompt == "alpaca" else f"{asked}\n"
        return [Segment(asked, False), Segment(last["content"], True)]

    def _chat(self, turns):
        """Every assistant turn is learnt, with what the template puts after it (the token that ends a turn)."""
        segments, done = [], ""
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            asked = self._render(turns[:place], add_generation_prompt=True)
            whole = self._render(turns[: place + 1])
            if not (asked.startswith(done) and whole.startswith(asked)):  # a template that rewrites earlier turns
                asked = self._render(turns[:-1], add_generation_prompt=True)
                return [Segment(asked, False), Segment(turns[-1]["content"], True)], True
            segments += [Segment(asked[len(done) :], False), Segment(whole[len(asked) :], True)]
            done = whole
        return segments, segments[-1].text.strip() == turns[-1]["content"].strip()

    def _render(self, turns, **options):
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)


def asked(question, prompt, tokenizer):
    """(text, whether the tokenizer's own special tokens go before it): a question in the form that models learn from.

    prompt: alpaca, chat or none.
    """
    formatter = Formatter("instruction", prompt, tokenizer)
    segments, _ = formatter({"instruction": question, "input": "", "output": "."})
    return "".join(segment.text for segment in segments if not segment.learnt), formatter.add_special_tokens


def _turns(row, kind):
    """A row as a conversation; a row with an empty field has fewer turns."""
    if kind == "chat":
        return row["messages"] or []
    if kind == "completion":
        asked, said = row["prompt"], row["completion"]
    else:
        extra, instruction = row.get("input") or "", row["instruction"] or ""
        asked = f"{instruction}\n\n{extra}" if extra else instruction
        said = row["output"]
    return [{"role": "user", "content": asked or ""}, {"role": "assistant", "content": said or ""}]
