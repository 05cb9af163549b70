"""The fetch rules: the only part of the study that touches the network.

Models come as whole snapshots under `resources/models/{model}/snapshot`, datasets as parquet beside their record; a
local folder is registered as it stands, never copied or written to. What comes from the hub is of one commit, which is
looked up once and recorded with the digests of its files (see `hub`).
"""

import logging
from pathlib import Path

from coppice import data, models
from coppice.core import fingerprints, records
from coppice.core.errors import CheckpointError, SettingsError
from coppice.models import files

from . import hub

logger = logging.getLogger("coppice.fetching")


def fetch_model(name, source, revision, record, prompt=None):
    """Fetch or register the model `source` ({kind, path}) and write `record`: {model, path, fingerprint, ...}.

    From the hub also the commit and the SHA-256 of each file. prompt: the form in which it will be asked. Raises
    CheckpointError where its files are torn, SettingsError where it cannot be asked so.
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
    if prompt == "chat" and files.has_chat_template(folder) is False:
        raise SettingsError(
            f"config key models.{name}.prompt: is chat (as for every instruct model where nothing is said), but the "
            f"tokenizer in {folder} has no chat template; set it to alpaca or none, or put the template beside it"
        )
    facts["path"] = str(folder)
    facts["parameters"] = models.count_parameters(folder)  # which also finds what a .bin file cannot be read as
    facts["weights_fingerprint"] = fingerprints.weights(folder)
    facts["provenance"] = clock.provenance(tokenizer=fingerprints.tokenizer(folder))
    records.write(record, facts)


def fetch_config(name, source, revision, output):
    """Download the configuration of the hub's model `source` ({kind, path}) to `output`, or copy its snapshot's."""
    folder = Path(output).parent
    if _is_snapshot_of(folder, source, revision):
        records.copy(folder / "snapshot/config.json", output)
        return
    pinned = hub.pin(f"models.{name}", "model", source["path"], revision, folder)
    hub.check_loadable(f"models.{name}", pinned)
    hub.download(f"models.{name}", pinned, folder, only=["config.json"])


def _is_snapshot_of(folder, source, revision):
    """Whether what was fetched into `folder` is this very model."""
    try:
        record = records.read(folder / "model.json")
    except records.RecordError:
        return False
    same = (record["source"], record["revision"]) == (source, revision)
    return same and (folder / "snapshot/config.json").is_file()


def fetch_dataset(name, entry, needs_selection, record, include_path=None, own_task=False):
    """Fetch or read the dataset `name` into the form that every stage reads.

    `entry` None means the data that the task's definition names, which is looked for in `include_path` first. own_task:
    the user has a definition of that name, which alone knows the columns it needs and what an answer is.
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


def _is_on_the_hub(entry):
    """Whether the data has to be fetched: a task's definition may also name a folder, or a format with files."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    if "source" in entry:
        return entry["source"]["kind"] == "hub"
    return entry["path"] not in FORMATS and not Path(entry["path"]).exists()
