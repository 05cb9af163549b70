"""Find and read the records behind a model and config, or behind an arm of an ablation."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coppice.core import records
from coppice.core.aliases import Json, PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.study import layout

from ..study_report import study_records

STAGES, STAGE_LABELS = study_records.STAGES, study_records.STAGE_LABELS
# Record of a chain -> what messages call it.
TITLES = {
    "comparison": "comparison",
    "dense": "evaluation of the dense model",
    "pruned": "evaluation of the pruned model",
    "finetuned": "evaluation of the fine-tuned model",
    "training": "fine-tuning",
    "selection": "selection",
    "candidate": "candidate",
    "scores": "scores of the candidate on the selection rows",
    "model": "dense model",
    "arm": "arm of the ablation",
    "report": "evaluation of the arm on the report rows",
}
FOLDERS = [layout.root(kind) for kind in ("finetuned", "training", "pruned", "selection")]


@dataclass(frozen=True)
class Link:
    """One record of a chain: its name, path and content. If it cannot be read, `problem` says why."""

    name: str
    path: Path
    record: Record | None = None
    problem: str | None = None

    @property
    def provenance(self) -> Record:
        """What the record's numbers depend on; {} if it holds nothing of that kind."""
        return (self.record or {}).get("provenance") or {}

    @property
    def fingerprints(self) -> Record:
        """The fingerprints of the weights and data that the record's numbers depend on."""
        return self.provenance.get("fingerprints") or {}

    def at(self, *keys: str, default: Json = None) -> Json:
        """Return the record's value under nested keys, or `default` if a key is missing."""
        found = self.record
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                return default
            found = found[key]
        return found


@dataclass
class Chain:
    """The records behind a result, from its report down to the data.

    Attributes:
        kind: "pair" (a model and config) or "arm" (of an ablation).
        identity: the names that the result has: model and config, or ablation, arm and seed.
        links: record name -> `Link`.
        datasets: data set -> `Link`, or None if its record was not found.
        report: path of the comparison report, or None.
        seed: seed of a repeated training, or None.
    """

    kind: str
    identity: Record
    links: dict[str, Link]
    datasets: dict[str, Link | None] = field(default_factory=dict)
    report: Path | None = None
    seed: int | None = None

    def __getitem__(self, name: str) -> Link:
        """Return the link to a record, an empty one if the chain has none of that name."""
        return self.links.get(name) or Link(name, Path(), None, None)

    @property
    def whole(self) -> list[Link]:
        """All links; those of data sets come last."""
        return [*self.links.values(), *(link for link in self.datasets.values() if link)]


def of_target(words: Sequence[str], results: PathLike, resources: PathLike | None, seed: int | None = None) -> Chain:
    """Return the `Chain` of what the user names: `words` is one path, or a model and a config."""
    if len(words) == 2:
        return of_pair(results, resources or resources_of(results), *words, seed)
    if len(words) != 1:
        raise CoppiceError("name either one file of the results, or a model and a config")
    path = Path(words[0])
    if not path.exists():
        raise CoppiceError(f"{path}: there is no such file; name a file of the results, or a model and a config")
    folder = path if path.is_dir() else path.parent
    if (folder / "arm.json").is_file():
        return of_arm(folder, resources or resources_of(_results_of_arm(folder)))
    inside, model, config, named = _pair_in(folder)
    return of_pair(inside, resources or resources_of(inside), model, config, named if seed is None else seed)


def resources_of(results: PathLike) -> PathLike:
    """Return the folder of models and data that the study's records name, or "resources" if they name none."""
    with contextlib.suppress(records.RecordError, KeyError):
        for name in records.read(Path(results) / ".gathered" / "report.json")["files"]:
            folder = next((place for place in Path(name).parents if place.name in ("datasets", "miniature")), None)
            if folder:
                return folder.parent
    return "resources"


def _results_of_arm(folder: Path) -> Path:
    """Return the results folder of an arm in {results}/ablation/{ablation}/{arm}/seed-{seed}."""
    return _relative(folder.absolute().parents[3])


def _pair_in(folder: Path) -> tuple[Path, str, str, int | None]:
    """Return (results, model, config, seed) of a folder in the results; seed is None without a seed folder."""
    parts = folder.absolute().parts
    place = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] in FOLDERS), None)
    inside = list(parts[place + 1 :]) if place is not None else []
    seed = next((int(found[1]) for part in inside if (found := re.fullmatch(r"seed-(\d+)", part))), None)
    inside = [part for part in inside if part not in ("samples", f"seed-{seed}")]
    if len(inside) < 2:
        raise CoppiceError(
            f"{folder}: not the folder of a model and config. Run coppice trace MODEL CONFIG, or name a file of their "
            "comparison, evaluation, fine-tuning or selection, or the folder of an ablation's arm."
        )
    results = _relative(Path(*parts[:place]))
    return results, "/".join(inside[:-1]), inside[-1].removesuffix(layout.TUNED), seed


def _relative(path: Path) -> Path:
    """Return `path` relative to the working directory if it lies in it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def of_pair(results: PathLike, resources: PathLike, model: str, config: str, seed: int | None = None) -> Chain:
    """Return the `Chain` behind the comparison report of a model and config."""
    paths = layout.of_pair(results, model, config, seed)
    if not any(path.is_file() for path in paths.values()):
        raise CoppiceError(
            f"{results}: there is no record of {model} {config}; check the names, or run snakemake first"
        )
    order = ("comparison", "dense", "pruned", "finetuned", "training", "selection")
    links = {name: read(name, paths[name]) for name in order}
    links |= _below(links["selection"], links["dense"], model, resources)
    identity = {"model": model, "config": config}
    chain = Chain("pair", identity, links, report=paths["comparison"].with_name("comparison_report.txt"), seed=seed)
    chain.datasets = _datasets(chain, resources)
    return chain


def of_arm(folder: Path, resources: PathLike) -> Chain:
    """Return the `Chain` behind an arm of an ablation with one seed.

    The checkpoint that the arm started from is found by its fingerprint, among the selections and the dense models.
    """
    arm = read("arm", folder / "arm.json")
    links = {"arm": arm}
    for part in arm.at("measured", default=[]):
        links[part] = read(part, folder / part / layout.EVALUATION)
    if arm.at("unfit") or arm.at("raced_out"):
        return Chain("arm", _identity(arm), links)
    links["training"] = read("training", folder / "finetuning_config.json")
    start, results = arm.fingerprints.get("weights"), _results_of_arm(folder)
    choices = (results / layout.root("selection")).glob(f"**/{layout.RECORDS['selection'][1]}")
    chosen = _first(choices, "selection", ("weights_fingerprint",), start)
    if chosen:
        links["selection"] = chosen
        links |= _below(chosen, Link("dense", Path()), chosen.at("model"), resources)
    elif model := _first(_models(resources), "model", ("weights_fingerprint",), start):
        links["model"] = model
    chain = Chain("arm", _identity(arm), links)
    chain.datasets = _datasets(chain, resources)
    return chain


def _identity(arm: Link) -> dict[str, Any]:
    """Return {ablation, arm, seed} of an arm's record."""
    return {key: arm.at(key) for key in ("ablation", "arm", "seed")}


def _below(selection: Link, dense: Link, model: str, resources: PathLike) -> dict[str, Link]:
    """Return the links below a selection: its candidate, the candidate's scores, and the dense model."""
    found = {}
    if selection.record:
        folder = layout.chosen_folder(selection.path, selection.record)
        found["candidate"] = read("candidate", folder / layout.RECORDS["candidate"][1])
        made, scored = layout.root("candidate"), layout.root("scores")
        scores = Path(*(scored if part == made else part for part in folder.parts), layout.EVALUATION)
        if scores.is_file():
            found["scores"] = read("scores", scores)
    candidate = found.get("candidate", selection)
    imported = candidate.at("settings", "method") == "imported"  # its record does not name the model it came from
    source = (None if imported else candidate.fingerprints.get("source")) or dense.fingerprints.get("weights")
    matching = _first(_models(resources), "model", ("weights_fingerprint",), source)
    usual = Path(resources) / "models" / str(model) / "model.json"
    if matching or usual.is_file():
        found["model"] = matching or read("model", usual)
    return found


def _models(resources: PathLike) -> Iterator[Path]:
    return Path(resources).glob("**/model.json")


def _first(paths: Iterable[Path], name: str, keys: Sequence[str], value: str | None) -> Link | None:
    """Return the `Link` to the first of the records at `paths` that holds `value` under `keys`, or None."""
    links = (read(name, path) for path in sorted(paths))
    return next((link for link in links if value is not None and link.at(*keys) == value), None)


def _datasets(chain: Chain, resources: PathLike) -> dict[str, Link | None]:
    """Return data set -> `Link`, or None if the resources lack it, for every data set that a record names."""
    named = {}
    for link in chain.links.values():
        prints = link.fingerprints.get("datasets")
        for name, print_ in (prints if isinstance(prints, dict) else {}).items():
            named.setdefault(name.partition(" (")[0], print_)  # "ptb (llmpruner-128)" is ptb under a further protocol
    calibration = chain["candidate"].at("recipe", "calibration", "dataset")
    if calibration:
        named.setdefault(calibration, chain["candidate"].fingerprints.get("calibration"))
    every = [read("data set", path) for path in sorted(Path(resources).glob("**/dataset.json"))]
    return {name: _dataset(name, print_, every) for name, print_ in named.items()}


def _dataset(name: str, print_: str | None, every: Sequence[Link]) -> Link | None:
    """Return the record that holds rows with this fingerprint, else the one with that name, else None."""
    fitting = [link for link in every if print_ in roles_of(link).values()]
    called = [link for link in every if name in (link.at("name"), link.path.parent.name)]
    both = [link for link in fitting if link in called]
    return next(iter(both or fitting or called), None)


def roles_of(link: Link) -> dict[str, str]:
    """Return role (train, selection, report, ...) -> fingerprint of a data set's rows."""
    return {role: facts["fingerprint"] for role, facts in (link.at("roles") or {}).items()}


def read(name: str, path: PathLike) -> Link:
    """Return the `Link` to the record at `path`; reading it verifies its checksum."""
    try:
        return Link(name, Path(path), records.read(path))
    except records.RecordError as error:
        return Link(name, Path(path), None, str(error))
