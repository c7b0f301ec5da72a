"""What the test Hub keeps: files, commits, tags, and the faults it is told to have."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Fault", "File", "Refusal", "Repository", "file_entry", "folder_entry"]


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


def file_entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.blob, "size": file.size, "path": path}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0,
            "path": path}  # fmt: skip
