"""The command `coppice`, for what a user does outside the workflow.

Each subcommand imports what it needs, so that `coppice --help` starts fast.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice import __version__
from coppice.cli import data_commands, job_commands
from coppice.core import disks
from coppice.core.aliases import Record
from coppice.core.errors import CoppiceError, printable
from coppice.core.logs import INTERRUPTED

if TYPE_CHECKING:
    from coppice.study.settings import Study

    # what `add_subparsers` returns; argparse has no public name for it
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status. A `CoppiceError`, a full disk and Ctrl-C print one line each."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters of the output
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser(words).parse_args(words)
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return code
    except CoppiceError as error:
        print(f"coppice {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"coppice {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        _discard_output()
        if isinstance(error, BrokenPipeError):  # as with `coppice show | head`
            return 1
        if (message := disks.explained(error, ["standard output"])) is None:
            raise
        print(f"coppice {arguments.command}: {message}", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """Redirect standard output to the null device, because Python flushes the buffered rest again when it exits."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coppice", description="Prune-then-finetune studies of language models.")
    parser.add_argument("--version", action="version", version=f"coppice {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser("show", help="show the state of a study as a table in the terminal")
    _study_arguments(show)
    show.set_defaults(run=_show)
    anchored = commands.add_parser("anchors", help="compare the study's numbers with published ones")
    _study_arguments(anchored)
    anchored.add_argument("--markdown", action="store_true", help="print the published values alone, as Markdown")
    anchored.set_defaults(run=_anchors)
    report = commands.add_parser("report", help="write the report from the records that exist, without running a job")
    _study_arguments(report)
    report.add_argument("--output", metavar="FOLDER", help="where to write it (default: RESULTS/report)")
    report.set_defaults(run=_report)
    _tracing(commands)
    planned = commands.add_parser("plan", help="estimate jobs, GPU hours, memory and disk of a study before it runs")
    planned.add_argument(
        "--configfile",
        nargs="+",
        default=[],
        metavar="FILE",
        help="configuration files, as for snakemake: they override config/config.yaml, and later files earlier ones",
    )
    planned.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="single values, as for snakemake: they override all files",
    )
    planned.add_argument("--cpu", action="store_true", help="plan for a machine without a GPU")
    planned.add_argument(
        "--tflops",
        type=_above_zero,
        default=150.0,
        help="operations a second that one GPU achieves in practice, in 10^12 (default: %(default)s)",
    )
    planned.set_defaults(run=_plan)
    job_commands.add(commands, words)
    data_commands.add(commands)
    # All arguments go to lm-eval, options included. With NUL as the prefix character argparse recognizes no options.
    harness = commands.add_parser(
        "lm-eval",
        help="run lm-eval's command line with the prefix-tree engine available as --model coppice",
        add_help=False,
        prefix_chars="\0",
    )
    harness.add_argument("words", nargs="*")
    harness.set_defaults(run=_harness)
    return parser


def _tracing(commands: Commands) -> None:
    traced = commands.add_parser("trace", help="show the records behind a number of the report, and check them")
    traced.add_argument(
        "of",
        nargs="+",
        metavar="FILE | MODEL CONFIG",
        help="the results folder or the study's report (one line for each pair), a file or folder in it (a "
        "comparison report, an ablation's arm), or a model and a config",
    )
    traced.add_argument(
        "--metric", help="one number: a metric such as average_acc or bleu4.<data set>, recovered or validation_loss"
    )
    traced.add_argument("--stage", choices=("dense", "pruned", "finetuned"), help="only the number of this stage")
    traced.add_argument("--seed", type=int, help="an additional seed of the training (finetune.seeds)")
    traced.add_argument(
        "--results",
        default="results",
        metavar="FOLDER",
        help="results folder of the model and config (default: %(default)s)",
    )
    traced.add_argument("--resources", metavar="FOLDER", help="folder of models and data (default: from the records)")
    traced.add_argument("--verify", action="store_true", help="also hash the weights, adapters and rows on disk")
    traced.add_argument("--json", action="store_true", help="print JSON with all settings")
    traced.set_defaults(run=_trace)


def _trace(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from coppice.report import provenance

    console = Console(highlight=False, markup=False, emoji=False)
    named = ("results", "resources", "metric", "stage", "seed", "verify")
    options = {name: getattr(arguments, name) for name in named}
    return 0 if provenance.trace(arguments.of, console, as_json=arguments.json, **options) else 1


def _above_zero(text: str) -> float:
    """Convert an option's text to a number above 0, as a `type` of argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, must be a number above 0")
    return number


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="?", default="results", help="the results folder (default: %(default)s)")
    parser.add_argument(
        "--configfile",
        nargs="+",
        default=[],
        metavar="FILE",
        help="configuration files of the study; later files override earlier ones. Without this option, models and "
        "configs are those that have records, and variants and families are guessed from their names",
    )


def _study(arguments: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, Record], str | None]:
    """Return (pairs, models, notice) of the study, from its configuration files or else from its records."""
    from coppice.report.study_report import study_records

    results = Path(arguments.results)
    if not results.is_dir():
        raise CoppiceError(f"{results}: there is no such folder; give the study's results folder")
    if not arguments.configfile:
        pairs, models = study_records.discover(results)
        return pairs, models, "models and configs found from the records; variants and families from the names"
    configured = _configured(arguments.configfile)
    keys = ("variant", "family", "base")
    models = {name: {key: getattr(model, key) for key in keys} for name, model in configured.models.items()}
    return configured.pairs(), models, None


def _configured(files: Sequence[str], words: Sequence[str] = ()) -> Study:
    """Return the Study of configuration files and `KEY=VALUE` words, merged as Snakemake merges them."""
    from snakemake.utils import update_config

    from coppice.planning import snakemake_compat
    from coppice.study import settings
    from coppice.study.settings import config_files

    given = snakemake_compat.parsed_config_arguments(words) if words else {}
    merged = {}
    for layer in (*map(config_files.read, files), given):
        update_config(merged, layer)
    return settings.load(merged, files)


def _show(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from coppice.report.study_report import study_records, terminal

    pairs, models, _ = _study(arguments)
    found = study_records.read(arguments.results, pairs, models)
    console = Console(highlight=False, markup=False, emoji=False)
    if found.pairs:
        terminal.show(found, console)
    console.print(terminal.tally(found), soft_wrap=True)
    for line in terminal.ablations(arguments.results):
        console.print(line, soft_wrap=True)
    for what, why in found.failed:
        console.print(printable(f"failed: {what}: {why}"), style="red", soft_wrap=True)


def _anchors(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from coppice.report import anchors
    from coppice.report.study_report import study_records

    if arguments.markdown:
        print(anchors.markdown(), end="")
        return
    pairs, models, notice = _study(arguments)
    found = anchors.compared(study_records.read(arguments.results, pairs, models))
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 300
    console.print(anchors.table(found))
    measured = sum(anchor.own is not None for anchor in found)
    console.print(f"Comparable numbers of this study: {measured}.", soft_wrap=True)
    if notice:
        console.print("Give --configfile: the records do not say which published model a model is.", soft_wrap=True)


def _plan(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from coppice.planning import plan
    from coppice.study.settings import config_files

    files = [str(config_files.base()), *arguments.configfile]
    study_records, on_gpu = _configured(files, arguments.config), not arguments.cpu
    shown, lines = plan.table(plan.plan(study_records, arguments.tflops, on_gpu), arguments.tflops, on_gpu)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(shown)
    for line in lines:
        console.print(line, soft_wrap=True)


def _report(arguments: argparse.Namespace) -> None:
    from coppice.report import study_report

    pairs, models, notice = _study(arguments)
    if not pairs:
        raise CoppiceError(f"{arguments.results}: has no record of any model and config; run snakemake first")
    output = Path(arguments.output or Path(arguments.results) / "report")
    study_report.write_report(arguments.results, pairs, models, output, {"models": notice} if notice else {})
    print(output / "study_report.html")


def _harness(arguments: argparse.Namespace) -> None:
    """Pass all arguments on to lm-eval. It discovers no models by itself, so the model `coppice` is registered here."""
    from lm_eval.__main__ import cli_evaluate

    from coppice.stages.evaluate.zero_shot import harness_model  # noqa: F401 - registers the model `coppice`

    sys.argv = ["coppice lm-eval", *arguments.words]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
