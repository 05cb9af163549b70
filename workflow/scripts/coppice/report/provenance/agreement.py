"""Whether the records of a chain agree: with each other, with the report that shows them, with the files on disk."""

from dataclasses import dataclass

from coppice import data, models
from coppice.core import fingerprints
from coppice.core.errors import CoppiceError
from coppice.stages.compare import report_text
from coppice.stages.compare.comparison import check_alike
from coppice.stats import stored_samples

from .chain import STAGES, roles_of

# Which record rests on which: the first shows or uses what the second holds
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
    """What was compared; whether it agrees, None where that could not be found out; and the words for it."""

    what: str
    agrees: bool | None
    detail: str


def of_chain(chain, verify=False):
    """All Checks of a chain; with `verify` files on disk are read and hashed, else only known digests count."""
    found = [Check(link.name, False, link.problem) for link in chain.whole if link.problem]
    for check in (_report, _names, _numbers, _alike, _weights, _rows, _times):
        found += check(chain)
    return found + _on_disk(chain, verify)


def notes(chain):
    """What differs without being wrong: versions and devices of the evaluations that are compared."""
    evaluated = [chain[stage] for stage in STAGES if chain[stage].record]
    found = []
    for key in ("versions", "device"):
        values = {stage.name: _told(stage.provenance.get(key)) for stage in evaluated}
        if len(set(values.values())) > 1:
            each = "; ".join(f"{name}: {value}" for name, value in values.items())
            found.append(f"{key} of the evaluations differ: {each}")
    for link in chain.links.values():
        if origin := link.at("reused_from"):
            found.append(f"{link.name}: taken over from {origin}, which chose the same candidate")
    return found


def _told(value):
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def short(print_):
    """The first digits of a fingerprint, as everywhere in messages."""
    return str(print_)[:12] if print_ else "none"


def _same(what, first, second):
    """The Check that two (name, value) agree; None where one of the values is not known."""
    (a, found), (b, wanted) = first, second
    if found is None or wanted is None:
        missing = a if found is None else b
        return Check(what, None, f"not recorded in the {missing}")
    if found == wanted:
        return Check(what, True, _value(found))
    return Check(what, False, f"{a} has {_value(found)}, {b} has {_value(wanted)}")


def _value(value):
    return short(value) if isinstance(value, str) and len(value) == 64 else str(value)


def _report(chain):
    """The text shows what the record of the comparison holds."""
    comparison, path = chain["comparison"], chain.report
    if path is None or not comparison.record:
        return []
    if not path.is_file():
        return [Check("report", False, f"{path}: there is no such file; run snakemake {path}")]
    same = path.read_text(encoding="utf-8") == report_text.render(comparison.record)
    words = "its text is that of comparison.json" if same else f"{path} does not show what comparison.json holds"
    return [Check("report", same, words)]


def _names(chain):
    """Each record is of the model and config in whose folder it lies."""
    found = []
    for name in ("comparison", "dense", "pruned", "finetuned", "training", "selection", "candidate"):
        link = chain[name]
        for key in ("model", "config"):
            if chain.kind == "pair" and link.at(key) and link.at(key) != chain.identity[key]:
                detail = f"{link.path} is of {key} {link.at(key)}"
                found.append(Check(f"{name} is of {' '.join(chain.identity.values())}", False, detail))
    return found


def _numbers(chain):
    """The numbers that the comparison shows are those of the evaluations; the arm's those of its training."""
    found = []
    for stage in STAGES:
        comparison, link = chain["comparison"], chain[stage]
        if not comparison.record or not link.record or (stage == "finetuned" and chain.seed is not None):
            continue
        shown = {key: value for key, value in numbers(comparison.record, stage).items() if value is not None}
        held = numbers_of(link.record)
        other = [name for name, value in shown.items() if not near(value, held.get(name))]
        detail = f"{len(shown)} numbers" if not other else _differing(other[0], shown, held, link.path)
        found.append(Check(f"comparison shows the numbers of the {stage} evaluation", not other, detail))
    if chain["arm"].record and chain["training"].record:
        both = [("arm", chain["arm"].at("validation_loss")), ("training", chain["training"].at("validation_loss"))]
        found.append(_same("arm has the validation loss of its training", *both))
    return found


def _differing(name, shown, held, path):
    return f"{name}: shown as {shown[name]}, {path} holds {held.get(name)}"


def near(a, b):
    """Equal but for the last digits, where a mean was taken in another order."""
    return a is not None and b is not None and abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


def numbers(comparison, stage):
    """metric -> the number that a comparison shows of a stage."""
    texts = {f"ppl.{name}": text[stage] for name, text in comparison["perplexity"].items()}
    tasks = {name: task[stage] for name, task in comparison["zero_shot"].items()}
    return texts | tasks | {"average_acc": (comparison["average_acc"] or {}).get(stage)}


def numbers_of(evaluation):
    """metric -> the number that an evaluation holds."""
    texts = {f"ppl.{name}": text["value"] for name, text in evaluation["perplexity"].items()}
    tasks = {name: task["value"] for name, task in evaluation["zero_shot"].items()}
    return texts | tasks | {"average_acc": evaluation["average_acc"]}


def _alike(chain):
    """The stages were measured alike, and what their losses and samples are kept in is of these evaluations."""
    evaluated = {stage: chain[stage] for stage in STAGES if chain[stage].record}
    found = []
    if "dense" in evaluated:
        found.append(_holds("stages were measured alike", check_alike, _records(evaluated)))
    for stage, link in evaluated.items():
        if link.at("perplexity"):
            found.append(
                _holds(f"losses of the {stage} evaluation are its own", stored_samples.losses, link.path.parent)
            )
    return found


def _records(links):
    return {name: link.record for name, link in links.items()}


def _holds(what, check, given):
    """The Check that `check(given)` refuses nothing."""
    try:
        check(given)
    except CoppiceError as error:
        return Check(what, False, str(error))
    return Check(what, True, "they were")


def _weights(chain):
    """Weights, adapter and tokenizer are the same wherever two records speak of the same model."""
    chosen = "selection" if chain["selection"].record else "model"
    pairs = [
        ("dense evaluation is of the dense model", _print_in("dense"), _whole("model")),
        ("pruned evaluation is of the selected checkpoint", _print_in("pruned"), _whole("selection")),
        ("fine-tuned evaluation is of the selected checkpoint", _print_in("finetuned"), _whole("selection")),
        ("training began from the chosen checkpoint", _print_in("training"), _whole(chosen)),
        ("arm began from the chosen checkpoint", _print_in("arm"), _whole(chosen)),
        ("arm has the tokenizer of its training", _print_in("arm", "tokenizer"), _print_in("training", "tokenizer")),
        ("selection links the candidate's weights", _whole("selection"), _whole("candidate")),
        ("scores are of the candidate", _print_in("scores"), _whole("candidate")),
        ("comparison names the candidate", ("comparison", ("candidate",)), ("candidate", ("candidate",))),
    ]
    if chain["candidate"].at("settings", "method") != "imported":  # a user's own was pruned elsewhere
        pairs.append(("candidate was pruned from the dense model", _print_in("candidate", "source"), _whole("model")))
    if chain.seed is None:
        for stage in STAGES:
            keys = ("weights", "adapter") if stage == "finetuned" else ("weights",)
            for key in keys:
                shown = ("comparison", ("provenance", "fingerprints", stage, key))
                pairs.append((f"comparison was made of these {stage} {key}", shown, _print_in(stage, key)))
    return [
        _same(what, (a, chain[a].at(*keys)), (b, chain[b].at(*others)))
        for what, (a, keys), (b, others) in pairs
        if chain[a].record and chain[b].record
    ]


def _print_in(name, key="weights"):
    """Where the record `name` holds a fingerprint in its provenance."""
    return name, ("provenance", "fingerprints", key)


def _whole(name):
    """Where the record `name` holds the fingerprint of the checkpoint that it is about."""
    return name, ("weights_fingerprint",)


def _rows(chain):
    """What was trained, calibrated and measured on are the rows of the data sets as they are now."""
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


def _of_rows(chain, link, prints):
    """One Check of all data sets that a record names with fingerprints."""
    what = f"{link.name}: rows of {', '.join(prints)}"
    wrong, unknown = [], []
    for name, print_ in prints.items():
        dataset = chain.datasets.get(name.partition(" (")[0])
        if dataset is None or not dataset.record:
            unknown.append(name)
        elif not any(known == print_ and _fits(link, name, role) for role, known in roles_of(dataset).items()):
            held = ", ".join(f"{role} {short(known)}" for role, known in roles_of(dataset).items())
            wrong.append(f"{name}: {short(print_)}, but {dataset.path} has {held}")
    if wrong:
        return Check(what, False, "; ".join(wrong))
    if unknown:
        return Check(what, None, f"not among the resources (--resources FOLDER): {', '.join(unknown)}")
    return Check(what, True, "as the data sets' records have them")


def _fits(link, name, role):
    """Whether a record may have used the rows of this role: tasks are scored on those of its purpose alone."""
    settings = link.provenance.get("settings") or {}
    if "purpose" in settings:
        return role == settings["purpose"] or name not in settings["zero_shot"]["tasks"]
    return role == "train"


def _times(chain):
    """No record began after one that rests on it. What was taken over from another config is older than its own."""
    found = []
    for above, below in RESTS_ON:
        first, second = chain[above], chain[below]
        ours, theirs = first.provenance.get("started"), second.provenance.get("started")
        if not ours or not theirs or first.at("reused_from"):
            continue
        what = f"{second.name} is not newer than the {first.name} that rests on it"
        both = f"{second.path} is of {theirs}, {first.path} of {ours}"
        found.append(Check(what, theirs <= ours, f"{theirs}, {ours}" if theirs <= ours else both))
    return found


def _on_disk(chain, verify):
    """The files beside the records are those that the records were written of."""
    read = fingerprints.content_digest if verify else fingerprints.known_digest
    found = []
    for name, folder in _folders(chain):
        found.append(_of_files(f"weights of the {name} on disk", chain[name].at("weights_fingerprint"), folder, read))
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


def _folders(chain):
    if chain["model"].record:
        yield "model", models.folder_of(chain["model"].path)
    for name in ("selection", "candidate"):
        if chain[name].record:
            yield name, chain[name].path.parent


def _of_files(what, print_, folder, read, kind=fingerprints.weights):
    try:
        held = kind(folder, read)
    except (CoppiceError, OSError) as error:
        return Check(what, None, f"not there: {error}")
    if print_ is None or held is None:
        return Check(what, None, "not read; --verify reads them" if print_ else "its fingerprint is not recorded")
    if held == print_:
        return Check(what, True, short(held))
    return Check(what, False, f"{folder} has {short(held)}, its record {short(print_)}")


def _samples_on_disk(link):
    """The items of an evaluation, on which its comparison rests, are those that it wrote."""
    what = f"samples of {link.name} on disk"
    try:
        files = [stored_samples.samples_file(link.path.parent, task) for task in link.record["samples"]]
    except CoppiceError as error:
        return Check(what, False, str(error))
    return Check(what, True, f"{len(files)} tasks")


def _rows_on_disk(name, link):
    """Every role's rows are read and hashed again."""
    what, other = f"rows of {name} on disk", []
    for role, print_ in roles_of(link).items():
        try:
            held = data.fingerprint_of(data.load(link.path, role))
        except CoppiceError as error:
            return Check(what, False, str(error))
        if held != print_:
            other.append(f"{link.path.parent / role}.parquet has {short(held)}, its record {short(print_)}")
    return Check(what, not other, other[0] if other else f"{len(roles_of(link))} roles")
