"""The fetch rules, the only part of the study that uses the network.

Models are stored as whole snapshots in `resources/models/{model}/snapshot`, datasets as parquet files beside their
record. A local folder is only registered, never copied or written to. Everything from the hub comes from one commit,
which is looked up once and recorded with the digests of its files (see `hub`).
"""

import logging
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CheckpointError, SettingsError
from coppice.models import files, intake

from . import hub

logger = logging.getLogger("coppice.fetching")

# What `datasets.load_dataset` takes for the format of local files instead of the name of a repository
FORMATS = ("arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml")


def fetch_model(
    name: str,
    source: Record,
    revision: str | None,
    record: PathLike,
    prompt: str | None = None,
    needs: intake.Needs | None = None,
) -> None:
    """Fetch a model from the hub, or register a local one, and write its model.json.

    The record holds the folder, the fingerprint and, for a model from the hub, the commit and the SHA-256 of each file.

    Args:
        name: name of the model.
        source: {kind: hub | local, path}.
        revision: branch, tag or commit on the hub, or None.
        record: path of the model.json to write.
        prompt: prompt format in which the model will be asked: alpaca, chat or none.
        needs: what else the study asks of the model; None checks nothing of it.

    Raises:
        CheckpointError: the model's files are incomplete or damaged.
        SettingsError: the prompt format is chat, but the tokenizer has no chat template.
    """
    clock = records.Clock()
    facts = {"model": name, "source": source, "revision": revision}
    if source["kind"] == "hub":
        folder = Path(record).parent / "snapshot"
        pinned = hub.pin(f"models.{name}", "model", source["path"], revision, folder.parent)
        hub.check_loadable(f"models.{name}", pinned)
        hub.clear(pinned, folder)
        hub.download(f"models.{name}", pinned, folder)
        facts["commit"] = pinned["commit"]
        facts["files"] = {path: fingerprints.file_digest(folder / path) for path in sorted(pinned["files"])}
    else:
        folder = Path(source["path"])
    try:
        files.check(folder)
        files.check_tokenizer(folder)
    except CheckpointError as error:
        raise CheckpointError(f"models.{name}.base: {error}") from error
    with intake.told_of(name):
        facts |= intake.check(folder, needs) if needs else {}
    if prompt == "chat" and files.has_chat_template(folder) is False:
        raise SettingsError(
            f"config key models.{name}.prompt: is chat (the default for an instruct model), but the tokenizer in "
            f"{folder} has no chat template. Set it to alpaca or none, or add the template to the folder."
        )
    facts["path"] = str(folder)
    facts["parameters"] = models.count_parameters(folder)  # also fails if a .bin file cannot be read
    facts["weights_fingerprint"] = fingerprints.weights(folder)
    facts["provenance"] = clock.provenance(tokenizer=fingerprints.tokenizer(folder))
    records.write(record, facts)


def fetch_config(name: str, source: Record, revision: str | None, output: PathLike) -> None:
    """Write the config.json of a model to `output`: from a local folder, a snapshot that is here, or the hub.

    Args:
        name: name of the model.
        source: {kind, path}.
        revision: branch, tag or commit on the hub, or None.
        output: path of the config.json to write.
    """
    folder = Path(output).parent
    if source["kind"] == "local":
        records.copy(Path(source["path"], "config.json"), output)
        return
    if _is_snapshot_of(folder, source, revision):
        records.copy(folder / "snapshot/config.json", output)
        return
    pinned = hub.pin(f"models.{name}", "model", source["path"], revision, folder)
    hub.check_loadable(f"models.{name}", pinned)
    hub.download(f"models.{name}", pinned, folder, only=["config.json"])


def _is_snapshot_of(folder: Path, source: Record, revision: str | None) -> bool:
    """Return True if `folder` holds a snapshot of this model and revision."""
    try:
        record = records.read(folder / "model.json")
    except records.RecordError:
        return False
    same = (record["source"], record["revision"]) == (source, revision)
    return same and (folder / "snapshot/config.json").is_file()


def fetch_dataset(
    name: str,
    entry: Record | None,
    needs_selection: bool,
    record: PathLike,
    include_path: PathLike | None = None,
    own_task: bool = False,
) -> None:
    """Fetch or read a dataset and write it in the form that every stage reads.

    Args:
        name: name of the dataset.
        entry: its resolved configuration, or None for the data that the task's definition names.
        needs_selection: True if selection rows are needed.
        record: path of the dataset.json to write.
        include_path: the user's folder of task definitions, searched first.
        own_task: True if the user defines the task `name`. Only that definition then knows the columns and answers, so
            those of lm-eval's task are not checked.
    """
    if entry is None:
        from .task_definitions import official_source

        entry = official_source(name, include_path)
    elif entry["source"]["kind"] == "local":
        entry = entry | {"path": entry["source"]["path"]}
    folder = Path(record).parent
    if _is_on_the_hub(entry):
        options = dict(entry.get("options") or {})
        entry = entry | {"revision": options.pop("revision", None) or entry.get("revision"), "options": options}
        entry["commit"] = hub.pin(f"datasets.{name}", "dataset", entry["path"], entry["revision"], folder)["commit"]
    required = () if own_task else data.TASK_COLUMNS.get(name, ())
    data.prepare(name, entry, folder, needs_selection, required)
    for role, facts in records.read(record)["roles"].items():
        logger.info("%s %s: %d rows of split %s", name, role, facts["rows"], facts["split"])


def _is_on_the_hub(entry: Record) -> bool:
    """Return True if the data is on the hub. A task's definition may also name a local folder or a file format."""
    if "source" in entry:
        return entry["source"]["kind"] == "hub"
    return entry["path"] not in FORMATS and not Path(entry["path"]).exists()
