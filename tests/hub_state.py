"""What the test Hub keeps: files, commits, tags, and the faults it is told to have."""

from __future__ import annotations

import hashlib
import itertools
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "EXPIRED",
    "READ_ONLY",
    "TOKEN",
    "Fault",
    "File",
    "HubState",
    "Refusal",
    "Repository",
    "file_entry",
    "folder_entry",
]

TOKEN = "hf_" + "write" * 7
READ_ONLY = "hf_" + "reads" * 7
EXPIRED = "hf_" + "stale" * 7


class File(NamedTuple):
    """A file in a commit."""

    blob: str
    """Git's sha1 of it (of its pointer, if it is large)."""
    size: int
    sha256: str | None
    """Set for large files."""


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, str, dict[str, File]]] = field(default_factory=list)
    """(id, message, files), oldest first."""
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, File]] | None:
        """Return commit id and files of a branch, tag or commit."""
        wanted = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next(((oid, files) for oid, _, files in self.commits if oid == wanted), None)


@dataclass
class Fault:
    method: str
    path: str
    """Part of the path."""
    kind: str
    """status: answer so; cut: close in mid-request; lost: do it, then close without an answer."""
    status: int = 500
    times: int = 1
    skip: int = 0
    """Matching requests to let through first."""


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubState:
    """Users, repositories and files of the test Hub; nothing of HTTP."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.users = {TOKEN: ("ann", "write"), READ_ONLY: ("ann", "read")}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        """Bytes of large files that came in whole."""
        self.xet = False
        """Take commits of files that Xet clients say they have stored."""
        self.lock = threading.RLock()
        self._count = itertools.count(1)

    def fault(self, method: str, path: str, kind: str = "status", **more: Any) -> None:
        """Inject a fault into matching requests."""
        self.faults.append(Fault(method, path, kind, **more))

    def struck(self, method: str, path: str) -> Fault | None:
        """Return the fault that strikes this request, if one does."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.times > 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def repository(self, name: str, kind: str = "datasets") -> Repository:
        """Return a repository's state."""
        return self.repositories[kind, name]

    def create(self, kind: str, name: str, *, private: bool) -> Repository:
        """Make a repository with the Hub's first commit."""
        made = Repository(private)
        self.repositories[kind, name] = made
        self.commit(made, "initial commit", {".gitattributes": self.store(b"*.parquet lfs\n")})
        return made

    def store(self, content: bytes) -> File:
        """Keep a small file."""
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        (self.folder / "objects" / blob).write_bytes(content)
        return File(blob, len(content), None)

    def commit(self, repository: Repository, message: str, files: dict[str, File]) -> str:
        """Add a commit; return its id."""
        text = f"{next(self._count)} {message} {sorted(files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        repository.commits.append((oid, message, files))
        return oid

    def path_of(self, file: File) -> Path:
        """Return where a file's content lies."""
        return self.folder / "objects" / (file.sha256 or file.blob)


def file_entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.blob, "size": file.size, "path": path}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0,
            "path": path}  # fmt: skip
