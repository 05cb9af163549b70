"""The hub: a commit that stays the same from the first look on, the files that it lists, and its refusals in words.

What was looked up is kept in `pinned.json` beside what is fetched: a download that was cut off goes on with the same
commit, and a second fetch brings no newer files unless another revision is asked for.
"""

import glob
import hashlib
import logging
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from coppice.core import fingerprints, records
from coppice.core.errors import CheckpointError, CoppiceError, TransientError, causes

logger = logging.getLogger("coppice.hub")

# Weights of other frameworks, and pickles beside safetensors, are not fetched; nor are the same weights once more in
# their makers' own layout.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py")
UNWANTED = ("original/*", "consolidated*", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json")


def pin(key, kind, repository, revision, folder):
    """{repository, revision, commit, files} of `revision` (None: the newest) as it was when first looked up.

    key: the configuration's entry, which errors name (`models.X`, `datasets.X`); kind: model | dataset. files (models
    only): path -> {size, sha256 (of large files) or blob (git's own digest)}. Kept in `folder`/pinned.json.
    """
    from huggingface_hub.utils import WeakFileLock

    path = Path(folder) / "pinned.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # a model's configuration and its weights are fetched by two jobs that may run at once
    with WeakFileLock(path.with_name(".pinned.lock")):
        known = records.read(path, "delete it and fetch again") if path.is_file() else {}
        asked = {"kind": kind, "repository": repository, "revision": revision}
        if all(known.get(name) == value for name, value in asked.items()):
            return known
        with in_words(key, repository, revision):
            found = asked | _look_up(kind, repository, revision)
        records.write(path, found)
    logger.info("%s: %s is at commit %s", key, repository, found["commit"])
    return found


def _look_up(kind, repository, revision):
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    api.auth_check(repository, repo_type=kind)  # what is said of a gated one is public, its content is not
    commit = api.repo_info(repository, revision=revision, repo_type=kind).sha
    if kind != "model":
        return {"commit": commit}
    files = {
        file.path: {"size": file.size} | ({"sha256": file.lfs.sha256} if file.lfs else {"blob": file.blob_id})
        for file in api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)
        if isinstance(file, RepoFile) and _is_wanted(file.path)
    }
    return {"commit": commit, "files": files}


def _is_wanted(path):
    return any(fnmatch(path, name) for name in WANTED) and not any(fnmatch(path, name) for name in UNWANTED)


def download(key, pinned, folder, only=None):
    """Bring the files of a `pin`, or those named in `only`, to `folder`; check each against the digest on the hub.

    Whole files that an earlier call left stay; the hub's client keeps no halves. A file with another digest is removed
    and told: the next call fetches it anew.
    """
    from huggingface_hub import snapshot_download

    folder = Path(folder)
    files = {path: facts for path, facts in pinned["files"].items() if only is None or path in only}
    if all(_is_that(folder / path, facts) for path, facts in files.items()):
        return
    with in_words(key, pinned["repository"], pinned["revision"]):
        snapshot_download(
            pinned["repository"],
            revision=pinned["commit"],
            local_dir=folder,
            allow_patterns=[glob.escape(path) for path in files],
        )
    damaged = [path for path, facts in files.items() if not _is_that(folder / path, facts)]
    for path in damaged:
        (folder / path).unlink(missing_ok=True)
    if damaged:
        raise TransientError(
            f"{key}: {', '.join(damaged)} of {pinned['repository']} came with another content than the hub lists for "
            f"commit {pinned['commit']}; what came is removed: run `snakemake fetch` again"
        )


def check_loadable(key, pinned):
    """Raise CheckpointError, before anything large is fetched, where a `pin` lists no configuration or no weights."""
    if "config.json" not in pinned["files"]:
        raise CheckpointError(f"{key}.base: {pinned['repository']} has no config.json: it is not a checkpoint")
    if not any(fnmatch(path, "*.safetensors") for path in pinned["files"]):
        raise CheckpointError(
            f"{key}.base: {pinned['repository']} has no weights as safetensors; load it and write it with "
            f"`save_pretrained`, and give that folder as {key}.base"
        )


def clear(pinned, folder):
    """Remove what another commit left in `folder` and this one does not have: its weights would be taken for ours."""
    for path in Path(folder).rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and ".cache" not in name.parts and name.as_posix() not in pinned["files"]:
            logger.info("%s is not in commit %s and goes", path, pinned["commit"])
            path.unlink()


def _is_that(path, facts):
    """Whether the file is there with the listed size and digest."""
    if not path.is_file() or path.stat().st_size != facts["size"]:
        return False
    if "sha256" in facts:
        return fingerprints.file_digest(path) == facts["sha256"]
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == facts["blob"]


@contextmanager
def in_words(key, repository, revision=None):
    """What the hub refuses, and having no network, as a CoppiceError that says what to do."""
    import httpx2

    try:
        yield
    except (OSError, httpx2.HTTPError) as error:  # the hub client's errors are of these, and its transport's
        raise refusal(key, repository, revision, error) from error


def refusal(key, repository, revision, error):
    """An error of the hub's client, or of a library that calls it, as one that says what it means and the remedy.

    A TransientError where the network was behind it.
    """
    import httpx2
    from huggingface_hub import errors

    chain = causes(error)
    where = f"{key}: {repository}"
    login = "then log in with `hf auth login` or set HF_TOKEN"
    for kind, words in (
        (errors.GatedRepoError, f"is gated: ask for access on its page (https://huggingface.co/{repository}), {login}"),
        (errors.RepositoryNotFoundError, f"is not on the hub, or it is private: check its name, {login}"),
        (
            errors.RevisionNotFoundError,
            f"has no revision '{revision}': set {key}.revision to one of its branches, tags or commits",
        ),
        (errors.OfflineModeIsEnabled, "cannot be fetched while HF_HUB_OFFLINE is set: unset it"),
    ):
        if any(isinstance(one, kind) for one in chain):
            return CoppiceError(f"{where} {words}")
    if any(isinstance(one, errors.HfHubHTTPError) and one.response.status_code == 401 for one in chain):
        return CoppiceError(f"{where}: the hub does not know your token: check HF_TOKEN, or run `hf auth login`")
    cause = next((one for one in chain if not isinstance(one, errors.LocalEntryNotFoundError)), error)
    reason = (str(cause).strip().splitlines() or ["no reason given"])[0]
    network = (httpx2.HTTPError, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    kind = TransientError if any(isinstance(one, network) for one in chain) else CoppiceError
    return kind(f"{where} cannot be fetched ({type(cause).__name__}: {reason}); files that have come are kept")
