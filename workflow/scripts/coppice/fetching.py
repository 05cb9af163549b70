"""The fetch rules: the only part of the study that touches the network.

Models come as whole snapshots under `resources/models/{model}/snapshot`, datasets as parquet beside their record; a
local folder is registered as it stands, never copied or written to.
"""

import logging
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint_files, data, fingerprints, models, records
from .errors import CheckpointError, CoppiceError

logger = logging.getLogger("coppice.fetching")

# Weights of other frameworks, and pickles beside safetensors, are not fetched.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py")


def fetch_model(name, source, revision, record):
    """Fetch or register the model `source` ({kind, path}) and write `record`: {model, path, fingerprint, ...}."""
    if source["kind"] == "hub":
        folder = _download(name, source["path"], revision, Path(record).parent / "snapshot")
    else:
        folder = Path(source["path"])
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"models.{name}.base: {source['path']} has no config.json: it is not a checkpoint")
    checkpoint_files.check(folder)
    checkpoint_files.check_tokenizer(folder)
    facts = {"model": name, "source": source, "revision": revision, "path": str(folder)}
    facts |= {"parameters": models.count_parameters(folder)}  # which also finds what a .bin file cannot be read as
    records.write(record, facts | {"weights_fingerprint": fingerprints.weights(folder)})


def fetch_config(name, source, revision, output):
    """Download the configuration of the hub's model `source` ({kind, path}) to `output`, or copy its snapshot's."""
    from huggingface_hub import hf_hub_download

    folder = Path(output).parent
    if _is_snapshot_of(folder, source, revision):
        records.copy(folder / "snapshot/config.json", output)
        return
    with _in_words(name, source["path"]):
        hf_hub_download(source["path"], "config.json", revision=revision, local_dir=folder)


def _is_snapshot_of(folder, source, revision):
    """Whether what was fetched into `folder` is this very model."""
    try:
        record = records.read(folder / "model.json")
    except records.RecordError:
        return False
    same = (record["source"], record["revision"]) == (source, revision)
    return same and (folder / "snapshot/config.json").is_file()


def _download(name, repository, revision, folder):
    """Download a snapshot, resuming what an earlier call left; returns its folder."""
    from huggingface_hub import snapshot_download

    with _in_words(name, repository):
        snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=list(WANTED))
    return folder


@contextmanager
def _in_words(name, repository):
    """What the hub answers, as errors that say what to do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise CoppiceError(
            f"models.{name}.base: {repository} is gated: ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CoppiceError(
            f"models.{name}.base: the hub has no {repository}, or it is private and HF_TOKEN is not set"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CoppiceError(f"models.{name}.base: {repository} cannot be fetched from the hub: {error}") from error


def fetch_dataset(name, entry, needs_selection, record, include_path=None):
    """Fetch or read the dataset `name` into the form that every stage reads.

    `entry` None means the data that the task's definition names, which is looked for in `include_path` first.
    """
    if entry is None:
        from .zero_shot import official_source

        entry = official_source(name, include_path)
    elif entry["source"]["kind"] == "local":
        entry = entry | {"path": entry["source"]["path"]}
    required = data.TASK_COLUMNS.get(name, ())
    data.prepare(name, entry, Path(record).parent, needs_selection, required)
    for role, facts in records.read(record)["roles"].items():
        logger.info("%s %s: %d rows of split %s", name, role, facts["rows"], facts["split"])
