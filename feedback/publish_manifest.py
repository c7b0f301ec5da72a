"""The manifest of a publication: what it was made of, what was found in it, and its files.

``manifest.json`` at the root of what is published. The manifests of the shard folders behind it lie
in ``manifests/``, without the paths of the machine that made them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from feedback.scan import find, redact

__all__ = [
    "CARD",
    "KIND",
    "MANIFEST",
    "count_rows",
    "parse",
    "public_card",
    "public_manifest",
    "public_text",
    "published_files",
]

KIND = "publication"
MANIFEST = "manifest.json"
CARD = "README.md"
_PRIVATE = ("secret", "endpoint", "path", "email")


def parse(text: str | bytes) -> dict[str, Any] | None:
    """Return the manifest of a publication, or None where ``text`` is something else."""
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    known = isinstance(manifest, dict) and manifest.get("kind") == KIND
    return manifest if known else None


def count_rows(manifest: Mapping[str, Any]) -> int:
    """Return how many rows a publication holds."""
    return sum(sum(splits.values()) for splits in manifest["rows"].values())


def published_files(manifest: Mapping[str, Any] | None) -> list[str]:
    """Return the paths of a publication's files, card and manifests included."""
    if manifest is None:
        return []
    sources = [source["manifest"] for source in manifest["sources"]]
    return [*(file["path"] for file in manifest["files"]), *sources, MANIFEST, CARD]


def public_manifest(value: Any) -> Any:
    """Return a stage's manifest with absolute paths cut to names, and nothing private in it."""
    if isinstance(value, Mapping):
        return {key: public_manifest(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public_manifest(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value:
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return redact(value, [span for span in find(value) if span.kind in _PRIVATE])


def public_text(path: Path) -> str:
    """Return the text of a stage's manifest as it is published."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps(public_manifest(manifest), indent=2, ensure_ascii=False) + "\n"


def public_card(text: str, allow: Collection[str] = ()) -> str:
    """Return a card without keys, paths of this machine, and addresses with passwords."""
    private = {"secret", "endpoint", "path"} - set(allow)
    return redact(text, [span for span in find(text) if span.kind in private])
