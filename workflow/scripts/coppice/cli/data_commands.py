"""Build data sets on the command line: `coppice build-code-data`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coppice.core.aliases import Record

if TYPE_CHECKING:
    from coppice.data.builders import Target

    # what `add_subparsers` returns; argparse has no public name for it
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    """Add the subcommands."""
    code = commands.add_parser("build-code-data", help="make fill-in-the-middle rows of source trees")
    code.add_argument(
        "--source-dir",
        action="append",
        required=True,
        metavar="DIR",
        help="a source tree: a git repository, a folder of several, or any folder; may be repeated",
    )
    _target(code, "0.9 0.05 0.05")
    code.add_argument(
        "--rows",
        choices=("spans", "files"),
        default="spans",
        help="spans to fill in, or whole files as text (default: %(default)s)",
    )
    code.add_argument("--languages", nargs="+", metavar="NAME", help="only these languages, such as python go")
    code.add_argument(
        "--licenses",
        nargs="+",
        metavar="SPDX",
        help="only files under these licenses, such as MIT Apache-2.0; permissive names the usual ones, and unknown "
        "files without a license",
    )
    code.add_argument(
        "--split-by",
        choices=("file", "folder", "repository"),
        default="file",
        help="what is never on two sides (default: %(default)s)",
    )
    code.add_argument(
        "--spans-per-file", type=int, default=4, metavar="N", help="the most rows of a file (default: %(default)s)"
    )
    code.add_argument(
        "--context-characters",
        type=int,
        default=0,
        metavar="N",
        help="the most characters of the repository's other files in front of each row (default: none)",
    )
    code.add_argument("--max-rows", type=int, metavar="N", help="a sample of at most N rows")
    code.set_defaults(run=_code)


def _target(parser: argparse.ArgumentParser, ratios: str) -> None:
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.jsonl",
        help="file of the training rows; the other roles' and the report go beside it",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[float(ratio) for ratio in ratios.split()],
        metavar="SHARE",
        help=f"shares of train, selection and report (default: {ratios}); 1 writes one file",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of every choice (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def _target_of(arguments: argparse.Namespace) -> Target:
    from coppice.core import logs
    from coppice.data.builders import Target

    logs.start_logging()
    return Target(arguments.output, arguments.ratios, arguments.seed, arguments.force)


def _show(target: Target, lines: list[str], report: Record) -> None:
    from coppice.core.errors import printable

    for line in lines:
        print(printable(line) if line.strip() == line else f"  {printable(line)}")
    for role in report["roles"]:
        print(target.file_of(role))
    print(f"{target.report} lists what was left out and why.")
    print(f"To use the rows, add to the configuration:\ndatasets:\n  {target.entry()}")


def _code(arguments: argparse.Namespace) -> None:
    from coppice.data import builders

    data = builders.CodeData(
        source_dirs=arguments.source_dir,
        rows=arguments.rows,
        languages=arguments.languages,
        licenses=arguments.licenses,
        split_by=arguments.split_by,
        spans_per_file=arguments.spans_per_file,
        context_characters=arguments.context_characters,
        max_rows=arguments.max_rows,
    )
    target = _target_of(arguments)
    report = builders.build_code_data(data, target)
    _show(target, builders.code.summary(report), report)
