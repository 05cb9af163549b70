"""Download from the Hugging Face Hub at a fixed commit, verify the files, and explain the hub's errors.

The first lookup of a revision is stored in `pinned.json` beside the downloaded files. An interrupted download therefore
continues with the same commit, and fetching again brings no newer files unless the revision changes.
"""

import glob
import hashlib
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CheckpointError, CoppiceError, TransientError, causes

logger = logging.getLogger("coppice.hub")

# Fetch neither weights of other frameworks nor pickles beside safetensors, nor a second copy of the weights in their
# maker's own layout (`original/`, `consolidated*`).
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py")
UNWANTED = ("original/*", "consolidated*", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json")


def pin(key: str, kind: str, repository: str, revision: str | None, folder: PathLike) -> Record:
    """Look up the commit of a revision once and return it with its files; later calls return the stored answer.

    Args:
        key: the configuration key that errors name (`models.X`, `datasets.X`).
        kind: model or dataset.
        repository: name on the hub.
        revision: branch, tag or commit, or None for the newest.
        folder: folder for the answer, pinned.json.

    Returns:
        {kind, repository, revision, commit, files}. files (models only): path -> {size, sha256 (large files) or blob
        (git's own digest)}.
    """
    from filelock import FileLock

    path = Path(folder) / "pinned.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two jobs that may run at once fetch a model's configuration and its weights; both must get the same commit.
    with FileLock(path.with_name(".pinned.lock")):
        stored = records.read(path, "delete it and fetch again") if path.is_file() else {}
        request = {"kind": kind, "repository": repository, "revision": revision}
        if all(stored.get(name) == value for name, value in request.items()):
            return stored
        with explained_errors(key, repository, revision):
            found = request | _look_up(kind, repository, revision)
        records.write(path, found)
    logger.info("%s: %s is at commit %s", key, repository, found["commit"])
    return found


def _look_up(kind: str, repository: str, revision: str | None) -> Record:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    # The facts about a gated repository are public, but its files are not: without this check, the lookup would succeed
    # and the download fail.
    api.auth_check(repository, repo_type=kind)
    commit = api.repo_info(repository, revision=revision, repo_type=kind).sha
    if kind != "model":
        return {"commit": commit}
    files = {
        file.path: {"size": file.size} | ({"sha256": file.lfs.sha256} if file.lfs else {"blob": file.blob_id})
        for file in api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)
        if isinstance(file, RepoFile) and _is_wanted(file.path)
    }
    return {"commit": commit, "files": files}


def _is_wanted(path: str) -> bool:
    return any(fnmatch(path, name) for name in WANTED) and not any(fnmatch(path, name) for name in UNWANTED)


def download(key: str, pinned: Record, folder: PathLike, only: Collection[str] | None = None) -> None:
    """Download files to `folder` and check each against its digest on the hub.

    Complete files of an earlier call are kept; the hub's client keeps no partial ones.

    Args:
        key: the configuration key that errors name.
        pinned: the answer of `pin`.
        folder: folder to write.
        only: paths to download; None for all.

    Raises:
        TransientError: a file's digest differs. The file is deleted, so that the next call fetches it again.
    """
    from huggingface_hub import snapshot_download

    folder = Path(folder)
    files = {path: facts for path, facts in pinned["files"].items() if only is None or path in only}
    if all(_is_intact(folder / path, facts) for path, facts in files.items()):
        return
    with explained_errors(key, pinned["repository"], pinned["revision"]):
        snapshot_download(
            pinned["repository"],
            revision=pinned["commit"],
            local_dir=folder,
            allow_patterns=[glob.escape(path) for path in files],
        )
    damaged = [path for path, facts in files.items() if not _is_intact(folder / path, facts)]
    for path in damaged:
        (folder / path).unlink(missing_ok=True)
    if damaged:
        raise TransientError(
            f"{key}: {', '.join(damaged)} of {pinned['repository']}: the content differs from what the hub lists for "
            f"commit {pinned['commit']}. The damaged files are deleted; run `snakemake fetch` again."
        )


def check_loadable(key: str, pinned: Record) -> None:
    """Raise CheckpointError, before any large download, if a `pin` lists no config.json or no safetensors weights."""
    if "config.json" not in pinned["files"]:
        raise CheckpointError(
            f"{key}.base: {pinned['repository']} has no config.json, so it is not a checkpoint. Name another one."
        )
    if not any(fnmatch(path, "*.safetensors") for path in pinned["files"]):
        raise CheckpointError(
            f"{key}.base: {pinned['repository']} has no safetensors weights. Load it, save it with `save_pretrained` "
            f"and set {key}.base to that folder."
        )


def clear(pinned: Record, folder: PathLike) -> None:
    """Delete files in `folder` that are not in this commit, because left-over weights would be loaded with the rest."""
    for path in Path(folder).rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and ".cache" not in name.parts and name.as_posix() not in pinned["files"]:
            logger.info("deleting %s, which is not in commit %s", path, pinned["commit"])
            path.unlink()


def _is_intact(path: Path, facts: Record) -> bool:
    """Return True if the file exists with the listed size and digest."""
    if not path.is_file() or path.stat().st_size != facts["size"]:
        return False
    if "sha256" in facts:
        return fingerprints.file_digest(path) == facts["sha256"]
    content = path.read_bytes()
    # For small files the hub lists git's digest, which covers a header with the size.
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == facts["blob"]


@contextmanager
def explained_errors(key: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the hub or the network into a CoppiceError that says what to do."""
    import httpx2

    try:
        yield
    except (OSError, httpx2.HTTPError) as error:  # base classes of the errors of the hub's client and its transport
        raise refusal(key, repository, revision, error) from error


def refusal(key: str, repository: str, revision: str | None, error: BaseException) -> CoppiceError:
    """Return the CoppiceError that explains an error of the hub's client, or of a library that calls it.

    It is a TransientError if the cause is the network.
    """
    import httpx2
    from huggingface_hub import errors

    chain = causes(error)
    where = f"{key}: {repository}"
    login = "then log in with `hf auth login` or set HF_TOKEN."
    page = f"https://huggingface.co/{repository}"
    for kind, words in (
        (errors.GatedRepoError, f"is gated. Ask for access on its page ({page}), {login}"),
        (errors.RepositoryNotFoundError, f"is not on the hub, or it is private. Check its name, {login}"),
        (
            errors.RevisionNotFoundError,
            f"has no revision '{revision}'. Set {key}.revision to one of its branches, tags or commits.",
        ),
        (errors.OfflineModeIsEnabled, "cannot be fetched while HF_HUB_OFFLINE is set. Unset it."),
    ):
        if any(isinstance(one, kind) for one in chain):
            return CoppiceError(f"{where} {words}")
    if any(isinstance(one, errors.HfHubHTTPError) and one.response.status_code == 401 for one in chain):
        return CoppiceError(f"{where}: the hub rejects your token. Check HF_TOKEN, or run `hf auth login`.")
    cause = next((one for one in chain if not isinstance(one, errors.LocalEntryNotFoundError)), error)
    reason = (str(cause).strip().splitlines() or ["no reason given"])[0]
    network = (httpx2.HTTPError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    kind = TransientError if any(isinstance(one, network) for one in chain) else CoppiceError
    return kind(
        f"{where} cannot be fetched ({type(cause).__name__}: {reason}). Complete files are kept; run `snakemake fetch` "
        "again."
    )
