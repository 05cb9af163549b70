"""Build data sets on the command line: `build-code-data`, `build-caption-data` and `split-data`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Record

if TYPE_CHECKING:
    from coppice.data.builders import Target

    # what `add_subparsers` returns; argparse has no public name for it
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    """Add the subcommands."""
    _add_code(commands)
    _add_captions(commands)
    _add_split(commands)


def _add_code(commands: Commands) -> None:
    code = commands.add_parser("build-code-data", help="make fill-in-the-middle rows of source trees")
    code.add_argument(
        "--source-dir",
        action="append",
        required=True,
        metavar="DIR",
        help="a source tree: a git repository, a folder of several, or any folder; may be repeated",
    )
    _target(code)
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


def _add_captions(commands: Commands) -> None:
    captions = commands.add_parser("build-caption-data", help="make caption data of annotated images")
    source = captions.add_mutually_exclusive_group(required=True)
    source.add_argument("--captions", metavar="FILE", help="COCO's captions (JSON with images and annotations)")
    source.add_argument(
        "--items", metavar="FILE", help="any JSON, JSON lines, CSV or Parquet of rows with caption or captions"
    )
    captions.add_argument(
        "--rows",
        choices=("text", "image"),
        default="text",
        help="text: a prompt and its captions; image: an image and its captions (default: %(default)s)",
    )
    captions.add_argument("--instances", metavar="FILE", help="COCO's instances, the objects in each image")
    captions.add_argument("--detections", metavar="FILE", help="a detector's results in COCO's format")
    captions.add_argument(
        "--template", metavar="TEXT|FILE", help="Jinja2 of the prompt, with image and objects, or an item's columns"
    )
    captions.add_argument(
        "--min-score", type=float, default=0.0, metavar="P", help="leave out detections below (default: %(default)s)"
    )
    captions.add_argument("--sample-count", type=int, metavar="N", help="a sample of N images (default: all)")
    _target(captions)
    captions.set_defaults(run=_captions)


def _add_split(commands: Commands) -> None:
    split = commands.add_parser("split-data", help="divide the rows of a file, with no group on two sides")
    split.add_argument("source", metavar="FILE", help="JSON, JSON lines, CSV or Parquet")
    split.add_argument(
        "--group-by",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="rows with a value in common, such as image_id, stay on one side (default: only equal rows do)",
    )
    split.add_argument("--sample-count", type=int, metavar="N", help="a sample of about N rows (default: all)")
    _target(split)
    split.set_defaults(run=_split)


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE.jsonl",
        help="file of the training rows; the other roles' and the report go beside it",
    )
    shares = parser.add_mutually_exclusive_group()
    shares.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="shares of train, selection and report (default: 0.9 0.05 0.05); 1 writes one file",
    )
    shares.add_argument(
        "--train-ratio",
        type=float,
        metavar="SHARE",
        help="share of train; selection and report get half of the rest each",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of every choice (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def _target_of(arguments: argparse.Namespace) -> Target:
    from coppice.core import logs
    from coppice.data.builders import Target, splitting

    logs.start_logging()
    ratios = arguments.ratios or splitting.RATIOS
    if arguments.train_ratio is not None:
        rest = (1 - arguments.train_ratio) / 2
        ratios = (arguments.train_ratio, rest, rest)
    return Target(arguments.output, ratios, arguments.seed, arguments.force)


def _show(target: Target, lines: Sequence[str], report: Record) -> None:
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


def _captions(arguments: argparse.Namespace) -> None:
    from coppice.data import builders

    named = ("captions", "items", "rows", "instances", "detections", "template", "min_score", "sample_count")
    data = builders.CaptionData(**{name: getattr(arguments, name) for name in named})
    target = _target_of(arguments)
    report = builders.build_caption_data(data, target)
    _show(target, builders.captions.summary(report), report)
    if data.rows == "image":
        print("Set image_root of the entry to the folder of the images.")


def _split(arguments: argparse.Namespace) -> None:
    from coppice.data import builders

    data = builders.SplitData(arguments.source, arguments.group_by, arguments.sample_count)
    target = _target_of(arguments)
    report = builders.split_data(data, target)
    _show(target, builders.grouped_rows.summary(report), report)
