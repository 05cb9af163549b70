"""Records under `resources` that another study made for settings of its own, under names that this one has too.

Within one working directory Snakemake sees that a setting changed and fetches anew. Of a folder that several studies
share it knows nothing of the kind: what is there by the right name would be taken for what was asked for.
"""

from . import fingerprints, local_data, records


def strangers(study, files):
    """path of a record -> in words what it is of, for those that are not of what the study asks for by their name.

    study: a settings.Study; files: its layout.Files. What is not there yet, or cannot be read, is left to its job.
    """
    found = {}
    for name in study.active_models():
        path, source = files.model(name), study.models[name]["source"]
        wanted = {"source": source, "revision": study.models[name]["revision"]}
        if source["kind"] != "miniature" and (other := _other(path, wanted, _of_model)):
            found[path] = f"is of {other}, and models.{name}.base is {source['path']}"
    for name, entry in study.datasets.items():
        if entry["source"]["kind"] != "miniature" and (other := _other(files.dataset(name), entry, _of_dataset)):
            found[files.dataset(name)] = f"is of {other}, and datasets.{name} says otherwise"
    return found


def _other(path, wanted, of):
    try:
        return of(records.read(path), wanted)
    except (records.RecordError, KeyError, TypeError):  # records of before may lack what is compared
        return None


def _of_model(record, wanted):
    if all(record[key] == value for key, value in wanted.items()):
        return None
    revision = f" ({record['revision']})" if record["revision"] else ""
    return f"{record['source']['path']}{revision}"


def _of_dataset(record, entry):
    source, splits = record["source"], record["provenance"]["settings"]["splits"]
    same = all(source[key] == entry[key] for key in ("name", "revision", "format", "columns"))
    same = same and splits == {role: split for role, split in entry["splits"].items() if split}
    if same and (source["path"] == entry["source"]["path"] or _same_files(record, entry)):
        return None
    return f"{source['path']}, splits {', '.join(f'{role}: {split}' for role, split in splits.items())}"


def _same_files(record, entry):
    """Whether the local files of a data set are those that were read, wherever they lie by now."""
    if not entry["format"]:
        return False
    splits = [split for split in entry["splits"].values() if split]
    paths = {path for split in splits for path in local_data.files_of(entry["source"]["path"], entry["format"], split)}
    read = record["provenance"]["fingerprints"]["files"]
    return {path.name: fingerprints.file_digest(path) for path in paths} == read
