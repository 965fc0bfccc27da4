"""A small Hub: real HTTP on this machine, with the endpoints huggingface_hub needs to upload a model and read it back.

Large files travel by plain LFS. Xet, the Hub's newer storage protocol, is not spoken: clients set
``HF_HUB_DISABLE_XET``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
from huggingface_hub import constants

Files = dict[str, bytes]


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str, **content: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.content = {"error": message, **content}


@dataclass
class Repository:
    """Commits and the branches that point to them; ``revision`` is either's name."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        sha = hashlib.sha1(repr((len(self.commits), files)).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str:
        if revision not in self.branches and revision not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.branches.get(revision, revision)


@dataclass
class Hub:
    """What the server holds and has seen. Each method answers one endpoint."""

    url: str
    token: str
    user: str = "someone"
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.repositories[name]

    def create_repository(self, body: bytes) -> Any:
        wanted = json.loads(body)
        name = f"{wanted['organization'] or self.user}/{wanted['name']}"
        if name in self.repositories:
            raise Refusal(409, "RepoAlreadyExists", "You already created this model repo", url=f"{self.url}/{name}")
        self.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        self.repositories[name].commit("main", {})
        return {"url": f"{self.url}/{name}"}

    def create_branch(self, body: bytes, name: str, branch: str) -> Any:
        repository = self.repository(name)
        if branch in repository.branches:
            raise Refusal(409, "BranchAlreadyExists", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def info(self, body: bytes, name: str, revision: str = "main") -> Any:
        repository = self.repository(name)
        return {"id": name, "sha": repository.sha(revision), "private": repository.private}

    def validate_card(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def choose_upload_modes(self, body: bytes, name: str, revision: str) -> Any:
        self.repository(name).sha(revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        return {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}

    def offer_lfs_uploads(self, body: bytes, name: str) -> Any:
        self.repository(name)
        verify = {"href": f"{self.url}/lfs/verify"}
        objects = json.loads(body)["objects"]
        actions = [{"upload": {"href": f"{self.url}/lfs/{each['oid']}"}, "verify": verify} for each in objects]
        offers = [{**each, "actions": action} for each, action in zip(objects, actions, strict=True)]
        return {"transfer": "basic", "objects": offers}

    def receive_lfs(self, body: bytes, oid: str) -> Any:
        self.objects[oid] = body
        return {}

    def verify_lfs(self, body: bytes) -> Any:
        claim, stored = json.loads(body), self.objects[json.loads(body)["oid"]]
        if (hashlib.sha256(stored).hexdigest(), len(stored)) != (claim["oid"], claim["size"]):
            raise Refusal(422, "LfsMismatch", "The object that arrived is not the one announced")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        repository = self.repository(name)
        files = dict(repository.commits[repository.sha(revision)])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        sha = repository.commit(revision, files)
        return {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha}

    def list_tree(self, body: bytes, name: str, revision: str, folder: str = "") -> Any:
        files = self.repository(name).commits[self.repository(name).sha(revision)]
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"No folder {folder}")
        if "recursive=true" in self.requests[-1].lower():
            return self.describe(inside)
        depth = len(PurePosixPath(folder).parts) + 1
        folders = {"/".join(PurePosixPath(path).parts[:depth]) for path in inside if path.count("/") >= depth}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": ""} for path in sorted(folders)]
        return entries + self.describe({path: inside[path] for path in inside if path.count("/") == depth - 1})

    def list_paths(self, body: bytes, name: str, revision: str) -> Any:
        files = self.repository(name).commits[self.repository(name).sha(revision)]
        wanted = parse_qs(body.decode())["paths"]
        return self.describe({path: files[path] for path in wanted if path in files})

    def describe(self, files: Files) -> Any:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]

    def download(self, body: bytes, name: str, revision: str, path: str) -> bytes:
        files = self.repository(name).commits[self.repository(name).sha(revision)]
        if path not in files:
            raise Refusal(404, "EntryNotFound", f"No file {path}")
        return files[path]


def connect_datasets(monkeypatch: Any, url: str, folder: Path) -> None:
    """Have `datasets` load from a server, and keep files in a folder: what a new process does for its environment."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Hub.create_repository),
    ("POST", "/api/validate-yaml", Hub.validate_card),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>.+)", Hub.create_branch),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Hub.choose_upload_modes),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.offer_lfs_uploads),
    ("POST", "/lfs/verify", Hub.verify_lfs),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Hub.receive_lfs),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Hub.commit),
    ("GET", f"/api/(?:models|datasets)/{NAME}", Hub.info),
    ("GET", f"/api/(?:models|datasets)/{NAME}/revision/{REVISION}", Hub.info),
    ("GET", f"/api/(?:models|datasets)/{NAME}/tree/{REVISION}(?:/(?P<folder>.*))?", Hub.list_tree),
    ("POST", f"/api/datasets/{NAME}/paths-info/{REVISION}", Hub.list_paths),
    ("GET", f"(?:/datasets)?/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.download),
]


class Connection(BaseHTTPRequestHandler):
    """One request: checks the token, finds the route, sends what the hub answers."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.hub.requests.append(f"{self.command} {self.path}")
        try:
            self.send(200, self.dispatch(body), {})
        except Refusal as refusal:
            self.send(refusal.status, refusal.content, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, body: bytes) -> Any:
        credentials = self.headers.get("Authorization")
        # As with presigned storage addresses, an upload's own address is its permission.
        if credentials != f"Bearer {self.server.hub.token}" and self.command != "PUT":
            # A careless server's message, which quotes what it was sent.
            raise Refusal(401, "", f"Invalid credentials in Authorization header: {credentials}")
        for method, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if match and method == self.command.replace("HEAD", "GET"):
                return endpoint(
                    self.server.hub,
                    body,
                    **{key: unquote(text) for key, text in match.groupdict().items() if text is not None},
                )
        raise Refusal(404, "", f"No such endpoint: {self.command} {self.path}")

    def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        etag, commit = hashlib.sha256(payload).hexdigest(), self.path.split("/resolve/")[-1].split("/")[0]
        for header, value in {"ETag": f'"{etag}"', "X-Repo-Commit": commit, **headers}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output free of the server's log."""


class HubServer(ThreadingHTTPServer):
    hub: Hub


@contextmanager
def serve(token: str) -> Iterator[Hub]:
    """Run a hub, which knows one token, for the length of a ``with`` block."""
    with HubServer(("127.0.0.1", 0), Connection) as server:
        server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}", token=token)
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.hub
        finally:
            server.shutdown()
