"""Run one training or ask a model questions on the command line: `coppice finetune`, `coppice generate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Record

if TYPE_CHECKING:
    # what `add_subparsers` returns; argparse has no public name for it
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# The options that say how a model is loaded, as `models.Source` takes them
LOADING = ("dtype", "quantize", "trust_remote_code", "device_map", "context_length", "eos_token")


def add(commands: Commands, words: Sequence[str]) -> None:
    """Add the subcommands, and their options if one of them is among `words`, those of the command line."""
    tuned = commands.add_parser(
        "finetune", help="run one training without the workflow; options have the names of the section finetune"
    )
    tried = commands.add_parser("generate", help="answer your questions with a model, with or without an adapter")
    if not {"finetune", "generate"} & set(words):
        return  # their options come from the settings, which would double the start-up time of the other commands
    _training_options(tuned)
    _question_options(tried)
    for parser in (tuned, tried):
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="precision of the weights (default: bfloat16 on a GPU that supports it, else float32)",
        )
        parser.add_argument("--quantize", choices=("4bit", "8bit"), help="load the base model quantized")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
        parser.add_argument("--device-map", metavar="MAP", help="auto: spread the model over several GPUs")
        parser.add_argument(
            "--context-length",
            type=int,
            metavar="N",
            help="tokens that the model takes (default: as its config.json says)",
        )
        parser.add_argument("--eos-token", metavar="TOKEN", help="end of texts (default: the tokenizer's)")


def _training_options(tuned: argparse.ArgumentParser) -> None:
    from coppice.cli import single_jobs

    tuned.add_argument("--model", required=True, metavar="FOLDER|ID", help="the checkpoint to start from")
    tuned.add_argument("--data", required=True, metavar="FILE|NAME|ID", help="examples: a local file, alpaca, a hub id")
    tuned.add_argument(
        "--image-root", metavar="DIR", help="folder of the pictures that the rows name (default: that of the data file)"
    )
    tuned.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder of the adapter; a later call resumes the training"
    )
    tuned.add_argument(
        "--train",
        choices=("lora", "all"),
        default="lora",
        help="train an adapter, or all weights (default: %(default)s)",
    )
    tuned.add_argument(
        "--prompt", choices=single_jobs.PROMPTS, help="prompt format (default: alpaca, or the usual one of the kind)"
    )
    tuned.add_argument("--seed", type=int, default=42, help="seed of the training (default: %(default)s)")
    tuned.add_argument(
        "--chat-date",
        metavar="YYYY-MM-DD",
        help="the day that a chat template reads as today (default: the day on which the training began)",
    )
    tuned.add_argument("--gpus", type=int, default=1, help="GPUs to train on, if there are any (default: %(default)s)")
    tuned.add_argument("--threads", type=int, help="CPU threads (default: all)")
    for key in single_jobs.options():
        name = key.path[-1]
        tuned.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            **_taken(key.form.kinds),
            metavar=name.upper(),
            help=single_jobs.help_text(key).replace("%", "%%"),
        )
    tuned.set_defaults(run=_finetune)


def _question_options(tried: argparse.ArgumentParser) -> None:
    from coppice.cli import single_jobs

    tried.add_argument("--model", required=True, metavar="FOLDER|ID", help="the checkpoint")
    tried.add_argument("--adapter", metavar="FOLDER", help="the adapter to load onto it")
    tried.add_argument("--merge", action="store_true", help="merge the adapter into the weights first")
    tried.add_argument("--output", metavar="FOLDER", help="with --merge: folder to write the merged checkpoint to")
    tried.add_argument(
        "--keep-sparsity",
        choices=("mask", "off"),
        default="mask",
        help="with --merge: whether zeros of pruned weights stay zero (default: %(default)s)",
    )
    tried.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="a question; may be repeated")
    tried.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture that the questions are about; may be repeated. <image> in a question marks its place",
    )
    tried.add_argument(
        "--form", choices=single_jobs.PROMPTS, help="prompt format (default: alpaca, or the usual one of the kind)"
    )
    tried.add_argument(
        "--new-tokens", type=int, default=128, help="largest number of tokens of an answer (default: %(default)s)"
    )
    tried.set_defaults(run=_generate)


def _taken(kinds: tuple[str, ...]) -> Record:
    """Return argparse settings of an option: several values if a list is among its kinds, at most one for a boolean."""
    if "list" in kinds:
        return {"nargs": "+"}
    return {"nargs": "?", "const": "true"} if "boolean" in kinds else {}


def _loading(arguments: argparse.Namespace) -> Record:
    return {key: getattr(arguments, key) for key in LOADING}


def _finetune(arguments: argparse.Namespace) -> None:
    from coppice.cli import single_jobs

    given = {name: getattr(arguments, name) for name in (key.path[-1] for key in single_jobs.options())}
    named = ("model", "output", "train", "prompt", "seed", "gpus", "threads", "chat_date", "image_root")
    options = {name: getattr(arguments, name) for name in named}
    job = single_jobs.Training(dataset=arguments.data, given=given, loading=_loading(arguments), **options)
    single_jobs.finetune(job)
    print(job.output)


def _generate(arguments: argparse.Namespace) -> None:
    from coppice.cli import single_jobs

    asked = single_jobs.Questions(
        model=arguments.model,
        adapter=arguments.adapter,
        keep_sparsity=arguments.keep_sparsity,
        questions=arguments.prompt,
        merge=arguments.merge,
        prompt=arguments.form,
        new_tokens=arguments.new_tokens,
        output=arguments.output,
        loading=_loading(arguments),
        images=arguments.image,
    )
    for answer in single_jobs.generate(asked):
        # A prompt that fills the model's context has no answer
        text = answer["text"] if answer["text"] is not None else "(the prompt fills the model's context)"
        print(f"> {answer['prompt']}\n{text}\n")
