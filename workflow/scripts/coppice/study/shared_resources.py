"""Records under `resources` that another study made for settings of its own, under names that this one has too.

Within one working directory Snakemake sees that a setting changed and fetches anew. Of a folder that several studies
share it knows nothing of the kind: what is there by the right name would be taken for what was asked for.
"""

from coppice.core import fingerprints, records

from . import local_files


def differing_records(study, files):
    """path of a record -> in words how it is not what the study asks for by that name; others are left out.

    study: a settings.Study; files: its layout.Files. What is not there yet, or cannot be read, is left to its job. Of a
    data set only what it is read from counts, not whether some of its rows were kept for the choice of candidates.
    """
    found = {}
    for name in study.active_models():
        wanted = study.models[name]
        if wanted["source"]["kind"] != "miniature":
            found[files.model(name)] = _told(files.model(name), f"models.{name}", wanted, _of_model)
    for name, wanted in study.datasets.items():
        if wanted["source"]["kind"] != "miniature":
            found[files.dataset(name)] = _told(files.dataset(name), f"datasets.{name}", wanted, _of_dataset)
    return {path: words for path, words in found.items() if words}


def _told(path, section, wanted, differing):
    try:
        differs = differing(records.read(path), wanted)
    except (records.RecordError, KeyError, TypeError):  # records of before may lack what is compared
        return None
    if differs is None:
        return None
    key, theirs, ours = differs
    return f"was made with {key} {theirs}, and {section}.{key} is {ours}"


def _of_model(record, wanted):
    """(key, value of the record, wanted value) of what differs first, or None."""
    if record["source"] != wanted["source"]:
        return "base", record["source"]["path"], wanted["source"]["path"]
    return _of_revision(record["revision"], record.get("commit"), wanted)


def _of_revision(revision, commit, wanted):
    """The same of a revision: one that is pinned to the commit which another name led to is no other one."""
    return None if wanted["revision"] in (revision, commit) else ("revision", revision, wanted["revision"])


def _of_dataset(record, entry):
    """(key, value of the record, wanted value) of what differs first, or None."""
    source, splits = record["source"], {role: split for role, split in entry["splits"].items() if split}
    if source["path"] != entry["source"]["path"] and not _same_files(record, entry):
        return "path", source["path"], entry["source"]["path"]
    given = record["provenance"]["settings"]["splits"]
    for key, theirs, ours in (
        *((key, source[key], entry[key]) for key in ("name", "format", "columns")),
        ("splits", given, splits),
    ):
        if theirs != ours:
            return key, theirs, ours
    return _of_revision(source["revision"], source.get("commit"), entry)


def _same_files(record, entry):
    """Whether the local files of a data set are those that were read, wherever they lie by now."""
    if not entry["format"]:
        return False
    splits = [split for split in entry["splits"].values() if split]
    paths = {path for split in splits for path in local_files.files_of(entry["source"]["path"], entry["format"], split)}
    read = record["provenance"]["fingerprints"]["files"]
    return {path.name: fingerprints.file_digest(path) for path in paths} == read
