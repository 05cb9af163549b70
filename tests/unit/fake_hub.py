"""A fake hub on 127.0.0.1: repositories with commits, large files, gated repositories, and bad connections."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".parquet")
WHAT = "revision|tree|resolve|auth-check"
ADDRESS = re.compile(rf"/(?:api/)?(?:(models|datasets)/)?([^/]+/[^/]+)(?:/({WHAT})(?:/([^/]+)(?:/(.*))?)?)?")


class Hub:
    """The content that the server offers and the requests that it got.

    repositories: "kind/name" -> list of commits, the newest last, each {path: bytes}
    gated: names of repositories whose files only `token` may read
    stale_token: a token that is no longer valid
    cut: path -> numbers of bytes after which the connections of its next requests break
    damaged: path -> the bytes that are sent instead
    requests: what was requested, as (method, address, Range header)
    """

    def __init__(self):
        self.repositories, self.requests = {}, []
        self.gated, self.cut, self.damaged = set(), {}, {}
        self.token, self.stale_token = None, None

    def add(self, name, files, kind="models"):
        """Add a commit to a repository and return its name."""
        self.repositories.setdefault(f"{kind}/{name}", []).append(files)
        return commit_of(files)

    def downloads(self, path):
        """Return the Range headers of the requests for the content of `path`."""
        return [span for method, address, span in self.requests if method == "GET" and address.endswith(path)]


def commit_of(files):
    """Return the name of a commit, a digest of its content."""
    return hashlib.sha1(b"".join(path.encode() + content for path, content in sorted(files.items()))).hexdigest()


def blob_of(content):
    """Return git's digest of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers like the hub's API: the newest commit, a commit's files, a file's content."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        """Print nothing into the test's output."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        address = self.path.partition("?")[0].replace("%2F", "~")
        hub.requests.append((self.command, address, self.headers.get("Range")))
        found = ADDRESS.fullmatch(address)
        kind, name, what, revision, path = found.groups() if found else (None,) * 5
        commits = hub.repositories.get(f"{kind or 'models'}/{name}")
        authorization = self.headers.get("Authorization")
        if hub.stale_token and authorization == f"Bearer {hub.stale_token}":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if commits is None:
            return self.refuse(401, "RepoNotFound")
        if what in ("auth-check", "resolve") and name in hub.gated and authorization != f"Bearer {hub.token}":
            return self.refuse(403 if authorization else 401, "GatedRepo")
        if what == "auth-check":
            return self.send({})
        by_name = {commit_of(files): files for files in commits} | {"main": commits[-1]}
        if (revision or "main") not in by_name:
            return self.refuse(404, "RevisionNotFound")
        files = by_name[revision or "main"]
        if what in (None, "revision"):
            return self.send({"id": name, "sha": commit_of(files), "siblings": [{"rfilename": p} for p in files]})
        if what == "tree":
            return self.send(listing(files, path, "recursive=true" in self.path.lower()))
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(path, files[path], commit_of(files))

    def do_POST(self):
        """Answer `paths-info`: which of the requested paths exist."""
        hub = self.server.hub
        requested = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        kind, name, revision = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", self.path).groups()
        commits = hub.repositories[f"{kind}/{name}"]
        files = ({commit_of(files): files for files in commits} | {"main": commits[-1]})[revision]
        self.send([entry(path, files[path]) for path in requested if path in files])

    def send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message="no"):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, path, content, commit):
        hub = self.server.hub
        digest = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else blob_of(content)
        content = hub.damaged.get(path, content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, last = (int(span[1]), int(span[2] or len(content) - 1)) if span else (0, len(content) - 1)
        part = content[start : last + 1]
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cut.get(path):
            self.wfile.write(part[: hub.cut[path].pop(0)])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(part)


def entry(path, content):
    """Return a file's entry in a tree listing."""
    facts = {"type": "file", "path": path, "size": len(content), "oid": blob_of(content)}
    if path.endswith(LARGE):
        facts["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return facts


def listing(files, folder, recursive):
    """Return the tree listing of a folder: its files and, unless `recursive`, its subfolders."""
    inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
    depth = folder.count("/") + 2 if folder else 1
    nested = {"/".join(path.split("/")[:depth]) for path in inside if path.count("/") >= depth}
    folders = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(nested)]
    return folders + [entry(path, inside[path]) for path in inside if recursive or path.count("/") < depth]


@contextmanager
def serving(hub=None):
    """Serve a hub while the block runs; yield (Hub, its address)."""
    hub = hub or Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = hub, True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
