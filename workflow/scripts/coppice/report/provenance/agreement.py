"""Check that the records of a chain agree with each other, with the report that shows them and with files on disk."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.stages.compare import report_text
from coppice.stages.compare.comparison import check_alike
from coppice.stats import metrics, stored_samples

from .chain import STAGE_LABELS, STAGES, TITLES, Chain, Link, roles_of

Numbers = Mapping[str, float | None]  # metric -> value, None if it was not measured
Place = tuple[str, tuple[str, ...]]  # (record of a chain, nested keys of a value in it)
Digest = Callable[[Path], str | None]  # returns the digest of a file, or None if it is not known without reading it

# (a record, a record that it was computed from): the second must not be newer than the first.
RESTS_ON = (
    ("comparison", "dense"),
    ("comparison", "pruned"),
    ("comparison", "finetuned"),
    ("comparison", "training"),
    ("finetuned", "training"),
    ("training", "candidate"),
    ("pruned", "candidate"),
    ("scores", "candidate"),
    ("candidate", "model"),
    ("dense", "model"),
    ("report", "training"),
    ("arm", "model"),
)


@dataclass(frozen=True)
class Check:
    """One check: the statement that was checked, whether it is true (None: unknown), and the details."""

    what: str
    agrees: bool | None
    detail: str


def of_chain(chain: Chain, verify: bool = False) -> list[Check]:
    """Return all `Check`s of a chain; `verify` hashes the files on disk again instead of using the cached digests."""
    found = [Check(TITLES.get(link.name, link.name), False, link.problem) for link in chain.whole if link.problem]
    for check in (_report, _names, _numbers, _alike, _weights, _rows, _times):
        found += check(chain)
    return found + _on_disk(chain, verify)


def notes(chain: Chain) -> list[str]:
    """Return sentences about differences that are not errors: versions, devices and reused results."""
    evaluated = [chain[stage] for stage in STAGES if chain[stage].record]
    found = []
    for key in ("versions", "device"):
        values = {STAGE_LABELS[stage.name]: _as_text(stage.provenance.get(key)) for stage in evaluated}
        if len(set(values.values())) > 1:
            each = "; ".join(f"{name}: {value}" for name, value in values.items())
            found.append(f"the evaluations differ in {key}: {each}")
    for link in chain.links.values():
        if origin := link.at("reused_from"):
            found.append(f"{TITLES.get(link.name, link.name)}: reused from {origin}, which chose the same candidate")
    return found


def _as_text(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def short(print_: object) -> str:
    """Return the first digits of a fingerprint, or "none"."""
    return str(print_)[:12] if print_ else "none"


def _same(what: str, first: tuple[str, object], second: tuple[str, object]) -> Check:
    """Return the `Check` that two (name, value) agree; it is unknown if one of the values is None."""
    (a, found), (b, wanted) = first, second
    if found is None or wanted is None:
        missing = a if found is None else b
        return Check(what, None, f"the {missing} record does not hold it")
    if found == wanted:
        return Check(what, True, _value(found))
    return Check(what, False, f"the {a} record has {_value(found)}, the {b} record {_value(wanted)}")


def _value(value: object) -> str:
    return short(value) if isinstance(value, str) and len(value) == 64 else str(value)


def _report(chain: Chain) -> list[Check]:
    """Check that the text of the comparison report shows what its record holds."""
    comparison, path = chain["comparison"], chain.report
    if path is None or not comparison.record:
        return []
    if not path.is_file():
        return [Check("report", False, f"{path}: there is no such file; run snakemake {path}")]
    same = path.read_text(encoding="utf-8") == report_text.render(comparison.record)
    detail = "its text matches comparison.json" if same else f"{path} does not show what comparison.json holds"
    return [Check("report", same, detail)]


def _names(chain: Chain) -> list[Check]:
    """Check that each record is about the model and config of the folder it lies in."""
    found = []
    for name in ("comparison", "dense", "pruned", "finetuned", "training", "selection", "candidate"):
        link = chain[name]
        for key in ("model", "config"):
            if chain.kind == "pair" and link.at(key) and link.at(key) != chain.identity[key]:
                detail = f"{link.path} is about {key} {link.at(key)}"
                found.append(Check(f"{TITLES[name]} is about {' '.join(chain.identity.values())}", False, detail))
    return found


def _numbers(chain: Chain) -> list[Check]:
    """Check that the comparison shows the numbers of its evaluations, and an arm the number of its training."""
    found = []
    for stage in STAGES:
        comparison, link = chain["comparison"], chain[stage]
        if not comparison.record or not link.record or (stage == "finetuned" and chain.seed is not None):
            continue
        shown = {key: value for key, value in numbers(comparison.record, stage).items() if value is not None}
        held = numbers_of(link.record)
        other = [name for name, value in shown.items() if not near(value, held.get(name))]
        detail = f"{len(shown)} numbers" if not other else _differing(other[0], shown, held, link.path)
        found.append(Check(f"comparison shows the numbers of the {STAGE_LABELS[stage]} evaluation", not other, detail))
    if chain["arm"].record and chain["training"].record:
        both = [("arm", chain["arm"].at("validation_loss")), ("training", chain["training"].at("validation_loss"))]
        found.append(_same("arm has the validation loss of its training", *both))
    return found


def _differing(name: str, shown: Numbers, held: Numbers, path: Path) -> str:
    return f"{name}: shown as {shown[name]}, but {path} holds {held.get(name)}"


def near(a: float | None, b: float | None) -> bool:
    """Return whether two numbers are equal but for the last digits: a mean in another order rounds differently."""
    return a is not None and b is not None and abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


def numbers(comparison: Record, stage: str) -> Numbers:
    """Return metric -> the number that a comparison shows for a stage."""
    return {metric.key: metric.part(comparison)[stage] for metric in metrics_of(comparison)}


def numbers_of(evaluation: Record) -> Numbers:
    """Return metric -> the number that an evaluation holds."""
    return {metric.key: metric.value(evaluation) for metric in metrics_of(evaluation)}


def metrics_of(record: Record) -> list[metrics.Metric]:
    """Return the metrics in an evaluation or a comparison; a mean follows its parts."""
    return metrics.details_in(record)


def _alike(chain: Chain) -> list[Check]:
    """Check that the stages were measured in the same way, and that each loss file belongs to its evaluation."""
    evaluated = {stage: chain[stage] for stage in STAGES if chain[stage].record}
    found = []
    if "dense" in evaluated:
        files = {stage: link.path for stage, link in evaluated.items()}
        found.append(_passes("stages were measured in the same way", check_alike, _records(evaluated), files))
    for stage, link in evaluated.items():
        if link.at("perplexity"):
            what = f"the loss file belongs to the {STAGE_LABELS[stage]} evaluation"
            found.append(_passes(what, stored_samples.losses, link.path.parent))
    return found


def _records(links: Mapping[str, Link]) -> dict[str, Record | None]:
    return {name: link.record for name, link in links.items()}


def _passes(what: str, check: Callable[..., object], *given: object) -> Check:
    """Return the `Check` that `check(*given)` raises no error."""
    try:
        check(*given)
    except CoppiceError as error:
        return Check(what, False, str(error))
    return Check(what, True, "yes")


def _weights(chain: Chain) -> list[Check]:
    """Check that two records about the same model hold the same fingerprints of weights, adapter and tokenizer."""
    chosen = "selection" if chain["selection"].record else "model"
    pairs = [
        ("dense evaluation measured the dense model", _print_in("dense"), _checkpoint_in("model")),
        ("pruned evaluation measured the selected checkpoint", _print_in("pruned"), _checkpoint_in("selection")),
        ("fine-tuned evaluation measured the selected checkpoint", _print_in("finetuned"), _checkpoint_in("selection")),
        ("training started from the chosen checkpoint", _print_in("training"), _checkpoint_in(chosen)),
        ("arm started from the chosen checkpoint", _print_in("arm"), _checkpoint_in(chosen)),
        ("arm uses the tokenizer of its training", _print_in("arm", "tokenizer"), _print_in("training", "tokenizer")),
        ("selection links to the candidate's weights", _checkpoint_in("selection"), _checkpoint_in("candidate")),
        ("scores were measured on the candidate", _print_in("scores"), _checkpoint_in("candidate")),
        ("comparison names the candidate", ("comparison", ("candidate",)), ("candidate", ("candidate",))),
    ]
    if chain["candidate"].at("settings", "method") != "imported":  # the user pruned an imported one elsewhere
        pairs.append(
            ("candidate was pruned from the dense model", _print_in("candidate", "source"), _checkpoint_in("model"))
        )
    if chain.seed is None:
        for stage in STAGES:
            keys = ("weights", "adapter") if stage == "finetuned" else ("weights",)
            for key in keys:
                shown = ("comparison", ("provenance", "fingerprints", stage, key))
                pairs.append(
                    (f"comparison used the {key} of the {STAGE_LABELS[stage]} evaluation", shown, _print_in(stage, key))
                )
    return [
        _same(what, (a, chain[a].at(*keys)), (b, chain[b].at(*others)))
        for what, (a, keys), (b, others) in pairs
        if chain[a].record and chain[b].record
    ]


def _print_in(name: str, key: str = "weights") -> Place:
    """Return (record, keys) of a fingerprint in the provenance of the record `name`."""
    return name, ("provenance", "fingerprints", key)


def _checkpoint_in(name: str) -> Place:
    """Return (record, keys) of the fingerprint of the checkpoint that the record `name` is about."""
    return name, ("weights_fingerprint",)


def _rows(chain: Chain) -> list[Check]:
    """Check that training, calibration and evaluation used the rows that the data sets hold now."""
    found = []
    for link in chain.links.values():
        prints = link.fingerprints.get("datasets")
        if isinstance(prints, dict):
            found.append(_of_rows(chain, link, prints))
    calibration = chain["candidate"].at("recipe", "calibration", "dataset")
    if calibration:
        prints = {calibration: chain["candidate"].fingerprints.get("calibration")}
        found.append(_of_rows(chain, chain["candidate"], prints))
    return found


def _of_rows(chain: Chain, link: Link, prints: Mapping[str, str | None]) -> Check:
    """Return one `Check` for all data sets that a record names, given as name -> fingerprint."""
    what = f"{TITLES.get(link.name, link.name)} used the rows of {', '.join(prints)}"
    wrong, unknown = [], []
    for name, print_ in prints.items():
        dataset = chain.datasets.get(name.partition(" (")[0])
        if dataset is None or not dataset.record:
            unknown.append(name)
        elif not any(held == print_ and _fits(link, name, role) for role, held in roles_of(dataset).items()):
            roles = ", ".join(f"{role} {short(held)}" for role, held in roles_of(dataset).items())
            wrong.append(f"{name}: the record has {short(print_)}, but {dataset.path} has {roles}")
    if wrong:
        return Check(what, False, "; ".join(wrong))
    if unknown:
        return Check(
            what, None, f"not found among the resources: {', '.join(unknown)}; name their folder with --resources"
        )
    return Check(what, True, "same as in the data sets' records")


def _fits(link: Link, name: str, role: str) -> bool:
    """Return whether a record may use the rows of this role.

    An evaluation scores tasks only on the rows of its purpose (selection or report); a training uses the train rows.
    """
    settings = link.provenance.get("settings") or {}
    if "purpose" in settings:
        return role == settings["purpose"] or name not in settings["zero_shot"]["tasks"]
    return role == "train"


def _times(chain: Chain) -> list[Check]:
    """Check that no record is newer than a record that was computed from it."""
    found = []
    for above, below in RESTS_ON:
        first, second = chain[above], chain[below]
        ours, theirs = first.provenance.get("started"), second.provenance.get("started")
        if not ours or not theirs:
            continue
        what = f"{TITLES[below]} is not newer than the {TITLES[above]} computed from it"
        both = f"{second.path} was started at {theirs}, {first.path} at {ours}"
        found.append(Check(what, theirs <= ours, f"{theirs}, {ours}" if theirs <= ours else both))
    return found


def _on_disk(chain: Chain, verify: bool) -> list[Check]:
    """Check that the files on disk have the fingerprints that their records hold."""
    read = fingerprints.content_digest if verify else fingerprints.cached_digest
    found = []
    for name, folder in _folders(chain):
        found.append(
            _of_files(f"weights of the {TITLES[name]} on disk", chain[name].at("weights_fingerprint"), folder, read)
        )
    trained = chain["training"]
    evaluated = chain["finetuned" if chain.kind == "pair" else "report"]
    if trained.record and evaluated.fingerprints.get("adapter"):
        print_ = evaluated.fingerprints["adapter"]
        found.append(_of_files("adapter on disk", print_, trained.path.parent, read))
    if chain["selection"].record and trained.record:
        print_, folder = trained.fingerprints.get("tokenizer"), chain["selection"].path.parent
        found.append(_of_files("tokenizer on disk", print_, folder, read, fingerprints.tokenizer))
    if verify:
        found += [_samples_on_disk(link) for link in chain.links.values() if link.at("samples")]
        found += [_rows_on_disk(name, link) for name, link in chain.datasets.items() if link and link.record]
    return found


def _folders(chain: Chain) -> Iterator[tuple[str, PathLike]]:
    """Yield (record, checkpoint folder) for each record that holds the fingerprint of a checkpoint on disk."""
    if chain["model"].record:
        yield "model", models.folder_of(chain["model"].path)
    for name in ("selection", "candidate"):
        if chain[name].record:
            yield name, chain[name].path.parent


def _of_files(
    what: str,
    print_: str | None,
    folder: PathLike,
    read: Digest,
    kind: Callable[[PathLike, Digest], str | None] = fingerprints.weights,
) -> Check:
    """Return the `Check` that the files in `folder` have the fingerprint `print_`.

    read: returns the digest of a file, or None if it is not known without reading the file.
    """
    try:
        held = kind(folder, read)
    except (CoppiceError, OSError) as error:
        return Check(what, None, f"not readable: {error}")
    if print_ is None or held is None:
        return Check(what, None, "not read; add --verify to read them" if print_ else "the record holds no fingerprint")
    if held == print_:
        return Check(what, True, short(held))
    return Check(what, False, f"{folder} has {short(held)}, but its record has {short(print_)}")


def _samples_on_disk(link: Link) -> Check:
    """Return the `Check` that an evaluation's samples are the files that it wrote."""
    what = f"samples of the {TITLES.get(link.name, link.name)} on disk"
    try:
        files = [stored_samples.samples_file(link.path.parent, task) for task in link.record["samples"]]
    except CoppiceError as error:
        return Check(what, False, str(error))
    return Check(what, True, f"{len(files)} tasks")


def _rows_on_disk(name: str, link: Link) -> Check:
    """Read and hash the rows of every role again, and return the `Check` that they match the record."""
    what, other = f"rows of {name} on disk", []
    for role, print_ in roles_of(link).items():
        try:
            held = data.fingerprint_of(data.load(link.path, role))
        except CoppiceError as error:
            return Check(what, False, str(error))
        if held != print_:
            other.append(f"{link.path.parent / role}.parquet has {short(held)}, but its record has {short(print_)}")
    return Check(what, not other, other[0] if other else f"{len(roles_of(link))} roles")
