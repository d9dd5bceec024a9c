"""A Hugging Face Hub on loopback: what the unmodified `huggingface_hub` client needs to share models and data sets.

It is a real HTTP server that keeps everything in memory, without Xet: files go through LFS or into the commit. Large
files live on a second host name, as the real Hub's lie on a CDN, so that tokens and redirects are treated as there.
`tests/conftest.py` sets `HF_ENDPOINT` to `ENDPOINT` before any client is imported; the fixture `hub` starts the server
there, lets the client go online as the user "me", and gives a `Hub`:

    def test_something(hub):
        model.push_to_hub("me/model")                       # transformers, datasets and `hf` in a subprocess alike
        assert set(hub.files("me/model")) == {...}
        hub.faults.append(Fault("commit"))                  # the next commits fail with a server error

A data set is a repository of parquet files (or whatever `datasets` finds):

    hub.add("me/images", {"data/train-00000-of-00001.parquet": Path(...).read_bytes()}, kind="datasets")
    load_dataset("me/images")

Users are "me" and "you" (`TOKENS`). Both may read public repositories and open pull requests; only the owner writes.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

# Holds the port for this process until a server listens on it; meanwhile connections are refused.
_RESERVED = socket.socket()
_RESERVED.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
_RESERVED.bind(("127.0.0.1", 0))
PORT = _RESERVED.getsockname()[1]
ENDPOINT = f"http://127.0.0.1:{PORT}"
STORAGE = f"http://localhost:{PORT}"

TOKENS = {"hf_me": "me", "hf_you": "you"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin", ".pt")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """What goes wrong: requests of a step fail, or their answers are cut.

    Args:
        step: name of a `Handler` method, such as "create", "preupload", "lfs_upload", "commit" or "resolve"; None:
            any.
        skip: requests of that step that still succeed before.
        times: how many fail.
        status: what they are answered.
        cut: instead, send this many bytes of the body and close the connection.
    """

    step: str | None = None
    skip: int = 0
    times: float = math.inf
    status: int = 500
    cut: int | None = None

    def strikes(self, step: str) -> bool:
        """Count a request, and say whether it goes wrong."""
        if self.step not in (None, step):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Commit:
    """A state of a repository: all of its files by path, and what led to it."""

    sha: str
    title: str
    description: str
    files: dict[str, bytes]
    parent: Commit | None

    def history(self) -> list[Commit]:
        """This commit and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repository:
    """Branches, tags and pull requests of a repository, by their full names."""

    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, tag, full reference name or hash."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        commits = itertools.chain.from_iterable(commit.history() for commit in self.refs.values())
        return next((commit for commit in commits if commit.sha == revision), None)

    def commit(self, ref: str, title: str, description: str, files: dict[str, bytes], parent: Commit | None) -> Commit:
        """Put a new commit at the tip of a reference."""
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        sha = hashlib.sha1(repr((ref, title, content, parent and parent.sha)).encode()).hexdigest()
        self.refs[ref] = Commit(sha, title, description, files, parent)
        return self.refs[ref]


class Hub(ThreadingHTTPServer):
    """The server, and what it holds.

    Attributes:
        repositories: by kind ("models" or "datasets") and id.
        objects: large files by SHA-256.
        faults: what goes wrong; the first that applies to a request strikes.
        steps: names of the steps that were asked for, in order.
        storage_tokens: `Authorization` headers that reached the storage host; there must be none.
    """

    daemon_threads = True
    allow_reuse_port = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", PORT), Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.steps: list[str] = []
        self.storage_tokens: list[str] = []
        self.lock = threading.Lock()

    def add(self, repo: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> None:
        """Create a repository, or put one more commit into it."""
        repository = self.repositories.get((kind, repo)) or self.create(repo, kind, private)
        tip = repository.refs["refs/heads/main"]
        repository.commit("refs/heads/main", "Add files", "", tip.files | files, tip)
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}

    def create(self, repo: str, kind: str, private: bool) -> Repository:
        """Create a repository with the commit that the Hub makes."""
        repository = self.repositories[kind, repo] = Repository(private)
        repository.commit("refs/heads/main", "initial commit", "", {".gitattributes": GIT_ATTRIBUTES}, None)
        return repository

    def history(self, repo: str, revision: str = "main", kind: str = "models") -> list[Commit]:
        """The commits of a revision, newest first."""
        commit = self.repositories[kind, repo].find(revision)
        assert commit is not None, f"{repo} has no {revision}"
        return commit.history()

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The files of a revision by path, without the `.gitattributes` that the Hub makes."""
        files = self.history(repo, revision, kind)[0].files
        return {path: data for path, data in files.items() if path != ".gitattributes"}


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers at `ENDPOINT`."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Refusal(Exception):
    """An answer that is an error, as the Hub words it: status, and code or message in a header."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message or code}


class Handler(BaseHTTPRequestHandler):
    """One method a step of the protocol; `ROUTES` says which requests it answers."""

    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fault: Fault | None = None

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self._read_body()
        routes = (
            (step, re.fullmatch(path, url.path)) for methods, path, step in ROUTES if self.command in methods.split()
        )
        step, match = next((route for route in routes if route[1]), (None, None))
        if step is None:
            return self.send(404, b"no such page")
        self.server.steps.append(step)
        self.fault = next((fault for fault in self.server.faults if fault.strikes(step)), None)
        if self.fault and self.fault.cut is None:
            return self.send(self.fault.status, b"a server error, as asked for")
        arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
        try:
            with self.server.lock:
                reply = getattr(self, step)(**arguments)
        except Refusal as refusal:
            return self.send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers)
        if isinstance(reply, tuple):
            return self.send(*reply)
        self.send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None:
            self.wfile.write(body[: self.fault.cut])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)

    # Who asks, and for what ------------------------------------------------------------------------------------------

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repository(self, kind: str | None, repo: str, write: bool = False) -> Repository:
        repository = self.server.repositories.get((kind or "models", repo))
        owner = repo.split("/")[0]
        if repository is None or (repository.private and self.user != owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != owner:
            raise Refusal(403 if self.user else 401, message=f"You have no write access to {repo}")
        return repository

    def _commit(self, kind: str | None, repo: str, revision: str) -> Commit:
        commit = self._repository(kind, repo).find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Repositories ----------------------------------------------------------------------------------------------------

    def whoami(self) -> object:
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        return {"name": self.user, "type": "user", "orgs": [], "auth": {"type": "access_token"}}

    def create(self) -> object:
        wanted = json.loads(self.body)
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        owner, kind = wanted.get("organization") or self.user, wanted.get("type", "model") + "s"
        repo = f"{owner}/{wanted['name']}"
        reply = {"id": repo, "name": repo, "url": f"{ENDPOINT}/{'' if kind == 'models' else kind + '/'}{repo}"}
        if owner != self.user:
            raise Refusal(403, message=f"You don't have the rights to create a model under the namespace {owner}")
        if (kind, repo) in self.server.repositories:
            return 409, json.dumps(reply | {"error": "You already created this repo"}).encode()
        self.server.create(repo, kind, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return reply

    def delete(self) -> object:
        wanted = json.loads(self.body)
        kind, repo = (
            (wanted.get("type") or "model") + "s",
            f"{wanted.get('organization') or self.user}/{wanted['name']}",
        )
        self._repository(kind, repo, write=True)
        del self.server.repositories[kind, repo]
        return {}

    def info(self, kind: str, repo: str, revision: str | None = None) -> object:
        commit = self._commit(kind, repo, revision or "main")
        card = re.match(rb"---\n(.*?)\n---", commit.files.get("README.md", b""), re.DOTALL)
        data = yaml.safe_load(card[1]) if card else {}
        return {
            "id": repo,
            "sha": commit.sha,
            "private": self._repository(kind, repo).private,
            "tags": data.get("tags", []),
            "pipeline_tag": data.get("pipeline_tag"),
            "library_name": data.get("library_name"),
            "lastModified": DATE,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def refs(self, kind: str, repo: str) -> object:
        refs = self._repository(kind, repo).refs
        kinds = {"branches": "heads", "tags": "tags", "pullRequests": "pr", "converts": "convert"}
        return {
            key: [
                {"name": name.removeprefix(f"refs/{part}/"), "ref": name, "targetCommit": commit.sha}
                for name, commit in refs.items()
                if name.startswith(f"refs/{part}/")
            ]
            for key, part in kinds.items()
        }

    def commits(self, kind: str, repo: str, revision: str) -> object:
        return [
            {"id": commit.sha, "title": commit.title, "message": commit.description, "date": DATE, "authors": []}
            for commit in self._commit(kind, repo, revision).history()
        ]

    def branch(self, kind: str, repo: str, branch: str) -> object:
        refs = self._repository(kind, repo, write=True).refs
        name = f"refs/heads/{branch}"
        if self.command == "DELETE":
            refs.pop(name)
        elif name in refs:
            raise Refusal(409, message=f"Reference already exists: {name}")
        else:
            refs[name] = self._commit(kind, repo, json.loads(self.body or b"{}").get("startingPoint") or "main")
        return {}

    def tag(self, kind: str, repo: str, revision: str) -> object:
        self._repository(kind, repo, write=True).refs[f"refs/tags/{json.loads(self.body)['tag']}"] = self._commit(
            kind, repo, revision
        )
        return {}

    # Files -----------------------------------------------------------------------------------------------------------

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> object:
        files = self._commit(kind, repo, revision).files
        start = f"{path}/" if path else ""
        below = [name for name in sorted(files) if name.startswith(start)]
        if not below and path:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        folders = {
            start + "/".join(parts[:depth])
            for name in below
            for parts in [name.removeprefix(start).split("/")]
            for depth in range(1, len(parts))
        }
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        shown = [name for name in (*sorted(folders), *below) if recursive or "/" not in name.removeprefix(start)]
        return [_entry(files, name) for name in shown]

    def paths_info(self, kind: str, repo: str, revision: str) -> object:
        files = self._commit(kind, repo, revision).files
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        known = [path for path in paths if path in files or any(name.startswith(path + "/") for name in files)]
        return [_entry(files, path) for path in known]

    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> object:
        commit = self._commit(kind, repo, revision)
        if path not in commit.files:
            raise EntryMissing(commit, path)
        data, headers = commit.files[path], {"X-Repo-Commit": commit.sha}
        if not path.endswith(LFS_SUFFIXES):
            return self._content(data, headers | {"ETag": f'"{_git_hash(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{STORAGE}/lfs/{oid}"}
        return 302, b"", headers

    def storage(self, oid: str) -> object:
        self.server.storage_tokens += self.headers.get_all("Authorization", [])
        if oid not in self.server.objects:
            raise Refusal(404, message="no such object")
        return self._content(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> object:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, data, headers
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        return 206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}

    # Pushing ---------------------------------------------------------------------------------------------------------

    def validate(self) -> object:
        card = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(card[1]) if card else {}
        except yaml.YAMLError as error:
            return 400, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode()
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

    def preupload(self, kind: str, repo: str, revision: str) -> object:
        self._repository(kind, repo, write="create_pr" not in self.query)
        files = self._commit(kind, repo, revision).files
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(path, files[path]) if path in files else None,
                }
                for path in (wanted["path"] for wanted in json.loads(self.body)["files"])
            ]
        }

    def lfs_batch(self, kind: str | None, repo: str) -> object:
        self._repository(kind, repo)
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{STORAGE}/lfs/{wanted['oid']}", "header": {}}}
            known = wanted["oid"] in self.server.objects
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if known else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> object:
        self.server.storage_tokens += self.headers.get_all("Authorization", [])
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="the content does not have this hash")
        self.server.objects[oid] = self.body
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> object:
        creates_pull_request = "create_pr" in self.query
        repository = self._repository(kind, repo, write=not creates_pull_request)
        parent, header = self._commit(kind, repo, revision), {}
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        files = dict(parent.files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile" if value["oid"] in self.server.objects:
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "lfsFile":
                    raise Refusal(400, message=f"LFS pointer pointed to a file that does not exist: {value['path']}")
                case "deletedFile" if value["path"] in files:
                    del files[value["path"]]
                case key:
                    raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {key} {value['path']}")
        if header.get("parentCommit") not in (None, parent.sha):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        ref = next(name for name in (revision, f"refs/heads/{revision}") if name in repository.refs)
        reply = {"success": True}
        if creates_pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref, reply = f"refs/pr/{number}", {"pullRequestUrl": f"{ENDPOINT}/{repo}/discussions/{number}"}
        made = repository.commit(ref, header["summary"], header["description"], files, parent)
        return reply | {"commitUrl": f"{ENDPOINT}/{quote(repo)}/commit/{made.sha}", "commitOid": made.sha}


class EntryMissing(Refusal):
    """No such file; which commit said so is kept by the client."""

    def __init__(self, commit: Commit, path: str):
        super().__init__(404, "EntryNotFound", f"{path} does not exist")
        self.headers["X-Repo-Commit"] = commit.sha


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_hash(data)


def _entry(files: dict[str, bytes], path: str) -> dict[str, object]:
    if path not in files:
        return {"type": "directory", "path": path, "oid": _git_hash(path.encode()), "size": 0}
    data = files[path]
    entry = {"type": "file", "path": path, "oid": _git_hash(data), "size": len(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"
_PAGE = rf"/(?:(?P<kind>datasets)/)?{_REPO}"
_REVISION = "(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/revision/{_REVISION}", "info"),
    ("GET", rf"{_API}/refs", "refs"),
    ("GET", rf"{_API}/commits/{_REVISION}", "commits"),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths_info"),
    ("POST DELETE", rf"{_API}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"{_API}/tag/{_REVISION}", "tag"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]{64})", "storage"),
    ("GET HEAD", rf"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
