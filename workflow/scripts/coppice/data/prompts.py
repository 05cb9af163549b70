"""Turn a dataset row into the text that a model is trained on: the prompt and the response.

`format_question` formats a single question in the same way.

The columns decide of which kind a row is (`KINDS`). A row may have several right answers, its references: each is an
example in training, and an evaluation compares with all of them. The Alpaca prompt is that of Stanford Alpaca (Taori et
al. 2023), which LLM-Pruner's recovery uses too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import jinja2

from coppice.core.aliases import Record
from coppice.core.errors import DataError, SettingsError
from coppice.models import infilling
from coppice.models.rows import Row, Segment

from . import picture_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .pictures import Album

Turn = dict[str, str]  # {role, content}

# kind -> what its rows need: of each group of columns at least one. The last group holds the answers, if there are any.
KINDS = {
    "chat": (("messages",),),
    "instruction": (("instruction",), ("output",)),
    "completion": (("prompt",), ("completion",)),
    "caption": (("prompt",), ("caption", "captions")),
    "pair": (("input",), ("target", "targets")),
    "program": (("prompt",), ("test",), ("canonical_solution",)),
    "fim": (("prefix",), ("suffix",), ("middle",)),
    "text": (("text",),),
    "image-chat": (("image", "images"), ("messages", "conversations")),
    "image-answer": (("image", "images"), ("question", "prompt"), ("answer", "answers", "response")),
    "image-caption": (("image", "images"), ("caption", "captions")),
    "image-label": (("image", "images"), ("label",)),
}
CHATS = ("chat", "image-chat")
# kind -> its column of finished prompts
QUESTIONS = {"completion": "prompt", "program": "prompt", "caption": "prompt", "pair": "input"}

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def kind_of(columns: Collection[str], dataset: str, accepted: Sequence[str] = tuple(KINDS)) -> str:
    """Return the kind of a dataset's rows from its columns; raise DataError if none of those `accepted` fits."""
    for kind in accepted:
        if all(set(group) & set(columns) for group in KINDS[kind]):
            return kind
    kinds = ", or ".join(f"{' and '.join(map(' | '.join, KINDS[kind]))} ({kind})" for kind in accepted)
    raise DataError(
        f"datasets.{dataset}: its rows need the columns {kinds}, but have {', '.join(columns)}. Map them with "
        f"datasets.{dataset}.columns."
    )


def references(row: Record, kind: str) -> list[str]:
    """Return the right answers of a row, without repetitions and empty ones."""
    if kind in ("text", "image-label"):
        return []
    if kind in CHATS:
        turns = picture_rows.conversation(row) if kind == "image-chat" else row["messages"] or []
        found = [turns[-1]["content"]] if turns and turns[-1]["role"] == "assistant" else []
    else:
        cells = [row.get(column) for column in KINDS[kind][-1]]
        found = [answer for cell in cells for answer in (cell if isinstance(cell, list) else [cell])]
    return list(dict.fromkeys(answer for answer in found if (answer or "").strip()))


class Formatter:
    """Turns rows of one kind into segments.

    `add_special_tokens` is True if the tokenizer must add its special tokens (BOS) before the first segment. A chat
    template already contains them.

    Args:
        kind: a key of `KINDS`.
        prompt: prompt format: alpaca, chat or none.
        tokenizer: the model's tokenizer, for its chat template.
        album: the pictures of the rows, for a model that sees.
    """

    def __init__(self, kind: str, prompt: str, tokenizer: PreTrainedTokenizerBase, album: Album | None = None) -> None:
        """Raise SettingsError if the tokenizer lacks what the rows need: a chat template, or infilling tokens."""
        if prompt == "chat" and not tokenizer.chat_template:
            raise SettingsError(
                "models.X.prompt: is chat, but the model's tokenizer has no chat template. Set it to another "
                "format (none fits every model), or add chat_template.jinja to the model's folder."
            )
        self.kind, self.prompt, self.tokenizer, self.album = kind, prompt, tokenizer, album
        self.chat = prompt == "chat" and kind not in ("fim", "text")
        self.infilling = infilling.tokens_of(tokenizer) if kind == "fim" else None
        self.add_special_tokens = not self.chat

    def rows(self, content: Record, where: str) -> list[Row]:
        """Return what to train on: a row for each reference.

        Args:
            content: the columns of a row of the data set.
            where: names the row in messages.

        Raises:
            DataError: the row is not of this kind, or the chat template rejects it.
        """
        return [self._row(content, where, [answer]) for answer in self._references(content, where)]

    def question(self, content: Record, where: str) -> Row:
        """Return what to ask a model and the references that its answer is compared with; see `rows`."""
        found = self._references(content, where)
        if found == [None]:
            raise DataError(f"{where}: has no answer to compare with. Add it, or remove the row.")
        return self._row(content, where, found)

    def _references(self, content: Record, where: str) -> list[str | None]:
        """Return the references of a row; [None] if there is nothing to choose from, because it is plain text."""
        try:
            return references(content, self.kind) or [None]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise self._misread(where, error) from error

    def _row(self, content: Record, where: str, answers: Sequence[str | None]) -> Row:
        try:
            segments, ends = self(content, answers[0], where)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template rejects it: {error}. Correct the row.") from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise self._misread(where, error) from error
        found = tuple(answer for answer in answers if answer)
        pictures = self.album.of_row(content) if self.album else []
        self._check_marks(segments, len(pictures), where)
        return Row(segments, ends, self.add_special_tokens, self.kind == "text", content, found, pictures, self.kind)

    def _check_marks(self, segments: Sequence[Segment], pictures: int, where: str) -> None:
        """Raise DataError if the model's text has not exactly one placeholder for each picture."""
        if not segments or self.album is None or self.album.placeholder is None:
            return
        token = self.album.placeholder.token
        found = sum(segment.text.count(token) for segment in segments)
        if found != pictures:
            raise DataError(
                f"{where}: has {pictures} pictures, but its text for the model {found} times {token}. Use a chat "
                "template that writes one for each picture, and remove that token from the row's own text."
            )

    def _misread(self, where: str, error: Exception) -> DataError:
        return DataError(
            f"{where}: cannot be read as a row of kind '{self.kind}', which the columns of the data set indicate "
            f"({error!r}). Correct the row."
        )

    def __call__(self, row: Record, answer: str | None = None, where: str = "a row") -> tuple[list[Segment], bool]:
        """Return (segments, True if EOS must follow them). A row without an answer gives no segments.

        answer: one of the row's references; where: names the row in messages.
        """
        if self.kind == "text":
            return [Segment(row["text"], True)] if (row["text"] or "").strip() else [], True
        if self.kind == "image-label":  # a class is no answer to a question; the kind of model writes it as a text
            return [], True
        if self.infilling:
            return infilling.segments(row, answer, self.infilling) if answer else [], not self.infilling.end
        turns = _turns(row, self.kind, answer)
        if not turns or turns[-1]["role"] != "assistant" or not (turns[-1]["content"] or "").strip():
            return [], True
        if self.kind.startswith("image-"):
            turns = picture_rows.marked(turns, len(row.get(picture_rows.COLUMN) or ()), where)
            turns = picture_rows.with_parts(turns) if self.chat else self._written(turns)
        return self._chat(turns) if self.chat else (self._plain(row, turns), True)

    def _written(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return turns in which the model's placeholder takes the place of each mark."""
        text = self.album.placeholder.text if self.album and self.album.placeholder else ""
        return [turn | {"content": turn["content"].replace(picture_rows.MARK, text)} for turn in turns]

    def _plain(self, row: Record, turns: Sequence[Turn]) -> list[Segment]:
        *before, last = turns
        if self.kind in QUESTIONS:
            return [Segment(row[QUESTIONS[self.kind]] or "", False), Segment(last["content"], True)]
        if self.prompt == "alpaca" and self.kind == "instruction":
            extra = row.get("input") or ""
            template = ALPACA_WITH_INPUT if extra else ALPACA
            prompt = template.format(instruction=row["instruction"] or "", input=extra)
        else:
            prompt = "\n\n".join(turn["content"] for turn in before)
            prompt = ALPACA.format(instruction=prompt) if self.prompt == "alpaca" else f"{prompt}\n"
        return [Segment(prompt, False), Segment(last["content"], True)]

    def _chat(self, turns: Sequence[Turn]) -> tuple[list[Segment], bool]:
        """Return segments in which every assistant turn is learned, with the end-of-turn token after it."""
        segments, done = [], ""
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prompt = self._render(turns[:place], add_generation_prompt=True)
            whole = self._render(turns[: place + 1])
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                # The template changes earlier turns if later ones follow, so its text cannot be cut into turns. Train
                # on the last turn only.
                prompt = self._render(turns[:-1], add_generation_prompt=True)
                return [Segment(prompt, False), Segment(turns[-1]["content"], True)], True
            segments += [Segment(prompt[len(done) :], False), Segment(whole[len(prompt) :], True)]
            done = whole
        # EOS is needed only if the template puts nothing after a turn.
        return segments, segments[-1].text.strip() == turns[-1]["content"].strip()

    def _render(self, turns: Sequence[Turn], **options: bool) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)


def format_question(question: str, prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Return (a question in the format that models are trained on, True if the tokenizer adds its special tokens).

    Args:
        question: the question, a string.
        prompt: prompt format: alpaca, chat or none.
        tokenizer: the model's tokenizer.
    """
    formatter = Formatter("instruction", prompt, tokenizer)
    # A row without a response gives no segments, so use a dummy one and drop it.
    segments, _ = formatter({"instruction": question, "input": ""}, ".")
    return "".join(segment.text for segment in segments if not segment.learned), formatter.add_special_tokens


def _turns(row: Record, kind: str, answer: str | None) -> list[Turn]:
    """Return a row as a list of turns, {role, content}, of which the last one is the answer."""
    if kind == "chat":
        return row["messages"] or []
    if kind == "image-chat":
        return picture_rows.conversation(row)
    if kind in ("image-answer", "image-caption"):
        prompt = picture_rows.question(row)
    elif kind in QUESTIONS:
        prompt = row[QUESTIONS[kind]]
    else:
        extra, instruction = row.get("input") or "", row["instruction"] or ""
        prompt = f"{instruction}\n\n{extra}" if extra else instruction
    return [{"role": "user", "content": prompt or ""}, {"role": "assistant", "content": answer or ""}]
