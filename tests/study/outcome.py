"""The results of a study without its times, and the differences between two studies."""

import json

from safetensors.numpy import load_file

# Keys that differ between two runs of the same study: times, memory, and what is computed from them
MEASURED = ("cost", "architectures")  # sections that hold times
TIMED = {
    "checksum",
    "started",
    "seconds",
    "tokens_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "peak_memory_bytes",
    "evaluation_seconds",
    "training_seconds",
    "freed_bytes",
}


def modification_times(folder):
    """Return {path: time of the last change, in ns} of the records in `results` and `resources` of a study."""
    return {path: path.stat().st_mtime_ns for path in records(folder)}


def records(folder):
    """Yield the paths of a study's records, except those inside checkpoints."""
    for root in ("results", "resources"):
        for path in (folder / root).rglob("*.json"):
            inside = path.relative_to(folder).parts
            hidden = any(part.startswith((".", "checkpoint-", "superseded-")) for part in inside)
            if not hidden and "schema_version" in path.read_text(encoding="utf-8"):
                yield path


def numbers(folder):
    """Return {path: content} of all results of the study in `folder`, without times.

    The results are records, sample tables, the tensors of adapters, and candidates.tsv.
    """
    import pandas

    found = {str(path.relative_to(folder)): without_times(json.loads(path.read_text())) for path in records(folder)}
    results = folder / "results"
    for path in results.rglob("*.parquet"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            found[str(path.relative_to(folder))] = pandas.read_parquet(path).to_json()
    for path in results.glob("*/**/adapter_model.safetensors"):
        if "checkpoint-" not in str(path):
            tensors = load_file(path)
            found[str(path.relative_to(folder))] = {name: tensors[name].tobytes() for name in sorted(tensors)}
    found["results/candidates.tsv"] = (results / "candidates.tsv").read_text()
    return found


def without_times(content):
    """Return a record's content without the keys that differ from run to run."""
    if isinstance(content, dict):
        return {
            key: "a time" if key in MEASURED and value else without_times(value)
            for key, value in content.items()
            if key not in TIMED
        }
    return [without_times(value) for value in content] if isinstance(content, list) else content


def differences(expected, found):
    """Return one line for each difference between two results of `numbers`."""
    lost = [f"{path}: is not there" for path in expected.keys() - found.keys()]
    more = [f"{path}: should not be there" for path in found.keys() - expected.keys()]
    other = [
        f"{path}: {_first_difference(expected[path], found[path])}"
        for path in expected.keys() & found.keys()
        if expected[path] != found[path]
    ]
    return sorted([*lost, *more, *other])


def _first_difference(one, other, place=""):
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{place}.{key}")
    return f"{place or 'content'} is {str(other)[:200]}, not {str(one)[:200]}"


def left_behind(folder):
    """Return the files and folders that only a killed job leaves."""
    return [path for root in ("results", "resources") for path in (folder / root).rglob(".partial*")]
