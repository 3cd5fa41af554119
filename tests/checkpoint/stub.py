"""A Hugging Face Hub on loopback: just enough of its API to download and upload, and to fail.

    with HubStub() as hub:
        hub.add("someone/model", {"config.json": b"{}", "model.safetensors": Sparse(16 << 30)})
        ... HF_ENDPOINT=hub.url ...
        hub.requests          # what was asked, in order

Serves model info, trees and files by revision, range requests, tokens, gated repositories and
connections that break off in the middle of a file. Takes commits of small files, and of large
ones through Git LFS, from the tokens in `writers`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 20


@dataclass(frozen=True)
class Sparse:
    """A file of `size` zero bytes that takes no memory."""

    size: int


Content = bytes | Sparse


def size_of(content: Content) -> int:
    return content.size if isinstance(content, Sparse) else len(content)


def digest_of(content: Content) -> str:
    """A stable stand-in for a file's SHA-256; exact for real bytes."""
    text = content if isinstance(content, bytes) else f"sparse {content.size}".encode()
    return hashlib.sha256(text).hexdigest()


def pieces(content: Content, start: int) -> Iterator[bytes]:
    size = size_of(content)
    while start < size:
        count = min(CHUNK, size - start)
        yield bytes(count) if isinstance(content, Sparse) else content[start : start + count]
        start += count


@dataclass
class Repository:
    """Revisions of one model and who may read it.

    revisions: name (branch or tag) -> path -> content. token: who reads must send it.
    gated: the terms must be accepted first (403). break_after: bytes of a file after which the
    connection is cut, once.
    """

    revisions: dict[str, Mapping[str, Content]]
    token: str | None = None
    gated: bool = False
    break_after: int | None = None

    def commit(self, revision: str) -> str | None:
        """The 40 hex digits of a revision, given by name or by itself."""
        for name, files in self.revisions.items():
            listing = sorted((path, digest_of(content)) for path, content in files.items())
            commit = hashlib.sha1(json.dumps([name, listing]).encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def files(self, revision: str) -> Mapping[str, Content]:
        commit = self.commit(revision)
        return next(f for name, f in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubStub:
    """The server; a context manager. `down` makes it answer 503 to everything.

    writers: token -> the user or organization it may write to. objects: what Git LFS holds, by
    SHA-256.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Asked] = field(default_factory=list)
    writers: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    down: bool = False

    def add(
        self, name: str, files: Mapping[str, Content], *, revision: str = "main", **options: Any
    ) -> Repository:
        known = self.repositories.get(name)
        if known is None:
            known = self.repositories[name] = Repository({}, **options)
        known.revisions[revision] = files
        return known

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloads(self) -> list[Asked]:
        """The requests for files' bytes."""
        return [
            asked for asked in self.requests if "/resolve/" in asked.path if asked.method == "GET"
        ]

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


API = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?")
FILE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
WRITE = re.compile(
    r"/api/models/(?P<commit>[^/]+/[^/]+)/commit/main|/api/models/(?P<preupload>[^/]+/[^/]+)"
    r"/preupload/main|/(?P<batch>[^/]+/[^/]+)\.git/info/lfs/objects/batch"
)


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does, for what `hub` holds."""

    hub: HubStub
    protocol_version = "HTTP/1.1"

    def noted(self) -> tuple[str, str | None]:
        """Path and token of a request, which is remembered."""
        path = unquote(urlsplit(self.path).path)
        bearer = self.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        self.hub.requests.append(Asked(self.command, path, self.headers.get("Range"), token))
        return path, token

    def do_GET(self) -> None:
        path, token = self.noted()
        if self.hub.down:
            self.fail(503, "")
        elif found := FILE.fullmatch(path):
            self.serve(found[1], found[2], token, found[3])
        elif found := API.fullmatch(path):
            self.serve(found[1], found[3] or "main", token, None, tree=found[2] == "tree")
        else:
            self.fail(404, "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        """An object of Git LFS; its address is its SHA-256."""
        path, _ = self.noted()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[path.removeprefix("/lfs/")] = content
        self.answer(b"")

    def do_POST(self) -> None:
        path, token = self.noted()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.down:
            return self.fail(503, "")
        if path == "/api/validate-yaml":
            return self.answer(b'{"warnings": [], "errors": []}')
        found = WRITE.fullmatch(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked["organization"] or self.hub.writers.get(token or "", "")
            name = f"{owner}/{asked['name']}"
        elif found:
            name = str(found[found.lastgroup or ""])
        else:
            return self.fail(404, "")
        if token not in self.hub.writers:
            return self.fail(401, "")
        if name.split("/")[0] != self.hub.writers[token]:
            return self.fail(403, "")
        status = 200
        if found is None:
            status = 409 if name in self.hub.repositories else 200
            self.hub.repositories.setdefault(name, Repository({"main": {}}))
            answer: dict[str, Any] = {"url": f"{self.hub.url}/{name}"}
        elif found.lastgroup == "preupload":
            answer = _upload_modes(json.loads(body))
        elif found.lastgroup == "batch":
            answer = _upload_places(self.hub, json.loads(body))
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            repository = self.hub.repositories[name]
            repository.revisions["main"] = {**repository.files("main"), **_files(self.hub, lines)}
            commit = repository.commit("main")
            answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit}
        self.answer(json.dumps(answer).encode(), status)

    def serve(
        self, name: str, revision: str, token: str | None, file: str | None, tree: bool = False
    ) -> None:
        repository = self.hub.repositories.get(name)
        # Like the Hub, which does not tell strangers what exists.
        if repository is None or (repository.token and token is None):
            return self.fail(401, "RepoNotFound")
        if repository.token and token != repository.token:
            return self.fail(401 if file else 404, "RepoNotFound")
        if repository.gated and file is not None:
            return self.fail(403, "GatedRepo")
        commit = repository.commit(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        files = repository.files(revision)
        if file is None:
            answer = _tree(files) if tree else _info(name, commit, files, repository.gated)
            return self.answer(json.dumps(answer).encode())
        if file not in files:
            return self.fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        self.send_file(repository, commit, files[file])

    def send_file(self, repository: Repository, commit: str, content: Content) -> None:
        size = size_of(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, size) if wanted and wanted[2] else size
        if wanted and start >= size > 0:
            return self.fail(416, "")
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{digest_of(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(size))
        self.send_header("X-Linked-Etag", f'"{digest_of(content)}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = repository.break_after
        sent = start
        for piece in pieces(content, start):
            piece = piece[: end - sent]
            if limit is not None and sent + len(piece) > limit:
                self.wfile.write(piece[: max(limit - sent, 0)])
                self.wfile.flush()
                repository.break_after = None
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(piece)
            sent += len(piece)
            if sent >= end:
                return

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests`; nothing goes to standard error."""


def _handler(hub: HubStub) -> type[BaseHTTPRequestHandler]:
    return type("BoundHandler", (Handler,), {"hub": hub})


def _upload_modes(asked: dict[str, Any]) -> dict[str, Any]:
    """Which files go through Git LFS: on the Hub, .gitattributes says so."""
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
    }


def _upload_places(hub: HubStub, asked: dict[str, Any]) -> dict[str, Any]:
    """Where to put each object; none for one that is there."""
    objects = []
    for wanted in asked["objects"]:
        place = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
        known = wanted["oid"] in hub.objects
        objects.append({**wanted, **({} if known else {"actions": place})})
    return {"transfer": "basic", "objects": objects}


def _files(hub: HubStub, lines: list[dict[str, Any]]) -> dict[str, Content]:
    """What a commit adds."""
    files: dict[str, Content] = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
    return files


def _info(name: str, commit: str, files: Mapping[str, Content], gated: bool) -> dict[str, Any]:
    siblings = [
        {"rfilename": path, "size": size_of(content), "blobId": digest_of(content)[:40]}
        for path, content in sorted(files.items())
    ]
    return {
        "id": name,
        "modelId": name,
        "sha": commit,
        "private": False,
        "gated": "manual" if gated else False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def _tree(files: Mapping[str, Content]) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": path,
            "size": size_of(content),
            "oid": digest_of(content)[:40],
            "lfs": {
                "oid": digest_of(content),
                "size": size_of(content),
                "pointerSize": 134,
            },
        }
        for path, content in sorted(files.items())
    ]
