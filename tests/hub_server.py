"""A small server that speaks the Hub's HTTP API, for tests: repositories, LFS, commits, tags.

What it does, it does for real: files are kept by hash and checked against it, a commit needs the
parent that it names, tokens and roles are enforced, a card's header is validated. ``fault`` injects
what goes wrong. Of Xet storage there is only what an upload needs (``xet``): the client's own
library writes to a local store, and nothing is served from there.

``with HubServer(folder) as hub: ... hub.url``
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import (
    EXPIRED,
    READ_ONLY,
    TOKEN,
    File,
    HubState,
    Refusal,
    Repository,
    file_entry,
    folder_entry,
)

__all__ = ["EXPIRED", "READ_ONLY", "TOKEN", "HubServer", "Repository"]

_REPO = r"(?P<kind>datasets|models)/(?P<repo>[^/]+/[^/]+)"
_LARGE = (".parquet", ".safetensors", ".arrow", ".png")


class HubServer(HubState):
    """The server; its state is open to tests."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *values: Any) -> None:
        """Say nothing."""

    def __getattr__(self, name: str) -> Any:
        """Answer every method in one place."""
        if name.startswith("do_"):
            return lambda: self._handle(name.removeprefix("do_"))
        raise AttributeError(name)

    def _handle(self, method: str) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.query = parse_qs(parts.query)
        fault = self.server_hub.struck(method, path)
        if fault is not None and fault.kind == "cut":
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000))
            self._hang_up()
            return
        try:
            if fault is not None and fault.kind == "status":
                self._body()
                raise Refusal(fault.status, "", "injected fault")
            for verb, pattern, function in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and (verb == method or (verb == "GET" and method == "HEAD")):
                    self._lost = fault is not None
                    function(self, **found.groupdict())
                    return
            self._body()
            raise Refusal(404, "EntryNotFound", f"no such route {method} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._answer({"error": refusal.message}, refusal.status, headers)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(
        self, value: Any = None, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        if getattr(self, "_lost", False):
            self._hang_up()
            return
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            if text:
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self, *, write: bool = False, owner: str | None = None) -> str | None:
        """Return who asks; None: nobody. Refuses bad tokens, and writes without the right."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.server_hub.users:
            self._body()
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        user, role = self.server_hub.users.get(token, (None, "none"))
        if write and (user is None or role != "write" or (owner and owner != user)):
            self._body()
            raise Refusal(403 if user else 401, "", "You don't have the rights to write here")
        return user

    def _repository(self, kind: str, repo: str, *, write: bool = False) -> Repository:
        user = self._user(write=write, owner=repo.split("/")[0] if write else None)
        found = self.server_hub.repositories.get((kind, repo))
        if found is None or (found.private and user != repo.split("/")[0]):
            self._body()
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def _at(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        found = repository.at(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # --- routes --------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        token = self.headers["Authorization"].removeprefix("Bearer ").strip()
        role = self.server_hub.users[token][1]
        access = {"displayName": "test", "role": role}
        self._answer({"type": "user", "name": user, "orgs": [],
                      "auth": {"type": "access_token", "accessToken": access}})  # fmt: skip

    def validate(self) -> None:
        import yaml

        content = json.loads(self._body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        header = yaml.safe_load(found[1]) if found else None
        if not isinstance(header, dict) or "license" not in header:
            errors = [{"message": "no header with a license"}]
            self._answer({"errors": errors, "warnings": []}, 400)
        else:
            self._answer({"errors": [], "warnings": []})

    def create(self) -> None:
        payload = json.loads(self._body())
        user = self._user(write=True)
        owner = payload.get("organization") or user
        if owner != user:
            raise Refusal(403, "", f'You don\'t have the rights to create under "{owner}"')
        kind, name = f"{payload.get('type') or 'model'}s", f"{owner}/{payload['name']}"
        private = payload.get("private") or payload.get("visibility") == "private"
        with self.server_hub.lock:
            taken = (kind, name) in self.server_hub.repositories
            if not taken:
                self.server_hub.create(kind, name, private=bool(private))
        url = f"{self.server_hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if taken:
            self._answer({"error": "You already created this repo", "url": url}, 409)
        else:
            self._answer({"url": url, "name": name, "id": name})

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        repository = self._repository(kind, repo)
        oid, files = self._at(repository, revision or "main")
        self._answer(
            {
                "_id": "1" * 24,
                "id": repo,
                "author": repo.split("/")[0],
                "sha": oid,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        files = repository.commits[-1][2]
        answer = []
        for asked in json.loads(self._body())["files"]:
            known = files.get(asked["path"])
            mode = "lfs" if asked["path"].endswith(_LARGE) else "regular"
            oid = None if known is None else known.sha256 or known.blob
            answer.append(
                {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._answer({"files": answer})

    def xet_token(self, kind: str, repo: str, revision: str) -> None:
        """Send Xet clients to a store in a folder, which their own library keeps."""
        self._repository(kind, repo, write=True)
        store = f"local://{self.server_hub.folder / 'xet'}"
        expires = 4_000_000_000
        self._answer(
            {"casUrl": store, "accessToken": "xet", "exp": expires},
            headers={
                "X-Xet-Cas-Url": store,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(expires),
            },
        )

    def batch(self, repo: str, prefix: str | None = None) -> None:
        kind = "datasets" if prefix else "models"
        self._repository(kind, repo, write=True)
        objects = []
        for asked in json.loads(self._body())["objects"]:
            place = self.server_hub.folder / "objects" / asked["oid"]
            entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if not place.is_file():
                href = f"{self.server_hub.url}/lfs/{asked['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        place = self.server_hub.folder / "objects" / f"{oid}.{threading.get_ident()}"
        digest, size = hashlib.sha256(), 0
        left = int(self.headers.get("Content-Length") or -1)
        with place.open("wb") as file:
            while block := self._chunk() if left < 0 else self.rfile.read(min(left, 1 << 20)):
                left -= len(block) if left >= 0 else 0
                size += len(block)
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != oid:
            place.unlink()
            raise Refusal(400, "", "content does not match its hash")
        place.replace(place.with_name(oid))
        self.server_hub.received += size
        self._answer(headers={"ETag": oid})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        header = lines[0]["value"]
        with self.server_hub.lock:
            oid, before = self._at(repository, revision)
            if header.get("parentCommit") not in (None, oid):
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(before)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            made = self.server_hub.commit(repository, header["summary"], files)
        self._answer({"commitUrl": f"{self.server_hub.url}/{repo}/commit/{made}",
                      "commitOid": made, "success": True})  # fmt: skip

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.server_hub.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            place = self.server_hub.folder / "objects" / value["oid"]
            if not place.is_file() and not self.server_hub.xet:
                raise Refusal(400, "", f"{path}: its content was never uploaded")
            blob = hashlib.sha1(value["oid"].encode()).hexdigest()
            files[path] = File(blob, value["size"], value["oid"])
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            del files[path]
        else:
            raise Refusal(400, "", f"unknown operation {key}")

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        _, files = self._at(self._repository(kind, repo), revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        entries: dict[str, Any] = {}
        for name, file in files.items():
            if not name.startswith(prefix):
                continue
            first, _, rest = name[len(prefix) :].partition("/")
            if rest:
                folder = prefix + first
                entries.setdefault(folder, folder_entry(folder))
            if not rest or recursive:
                entries[name] = file_entry(name, file)
        if path and not entries:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        self._answer(list(entries.values()))

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, files = self._at(self._repository(kind, repo), revision)
        body = self._body().decode()
        form = json.loads(body) if body.startswith("{") else parse_qs(body)
        answer = []
        for path in form.get("paths", []):
            if path in files:
                answer.append(file_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                answer.append(folder_entry(path))
        self._answer(answer)

    def refs(self, kind: str, repo: str) -> None:
        repository = self._repository(kind, repo)
        head = repository.commits[-1][0]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": head}
        tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
                for name, oid in repository.tags.items()]  # fmt: skip
        self._answer({"branches": [main], "tags": tags, "converts": []})

    def add_tag(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        tag = json.loads(self._body())["tag"]
        if tag in repository.tags:
            raise Refusal(409, "", "Tag reference exists already")
        repository.tags[tag] = self._at(repository, revision)[0]
        self._answer(status=201)

    def delete_tag(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        if repository.tags.pop(revision, None) is None:
            raise Refusal(404, "RevisionNotFound", "no such tag")
        self._answer()

    def resolve(self, repo: str, revision: str, path: str, prefix: str | None = None) -> None:
        repository = self._repository("datasets" if prefix else "models", repo)
        oid, files = self._at(repository, revision)
        file = files.get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        place = self.server_hub.path_of(file)
        start, end, status = 0, file.size, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            end = min(int(found[2]) + 1 if found[2] else file.size, file.size)
        self.send_response(status)
        self.send_header("ETag", f'"{file.sha256 or file.blob}"')
        self.send_header("X-Repo-Commit", oid)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size}")
        self.end_headers()
        if self.command != "HEAD":
            with place.open("rb") as content:
                content.seek(start)
                if start == 0 and end == file.size:
                    shutil.copyfileobj(content, self.wfile)
                else:
                    self.wfile.write(content.read(end - start))


_LINK = r"/(?:(?P<prefix>datasets)/)?(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/{_REPO}/refs", _Handler.refs),
    ("GET", f"/api/{_REPO}(?:/revision/(?P<revision>.+))?", _Handler.info),
    ("POST", f"/api/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("GET", f"/api/{_REPO}/xet-write-token/(?P<revision>.+)", _Handler.xet_token),
    ("POST", f"/api/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"/api/{_REPO}/tag/(?P<revision>.+)", _Handler.add_tag),
    ("DELETE", f"/api/{_REPO}/tag/(?P<revision>.+)", _Handler.delete_tag),
    ("GET", f"/api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", _Handler.tree),
    ("POST", f"/api/{_REPO}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("POST", _LINK + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    ("GET", _LINK + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
