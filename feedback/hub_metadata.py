"""The YAML header of a card, by the Hub's rules.

The Hub checks a card's header when it is pushed, and refuses licences and tasks that it does not
know. Everything it would refuse is refused here first, with a line that names the way out.

Lists: https://huggingface.co/docs/hub/repositories-licenses (licences) and
https://huggingface.co/docs/hub/datasets-cards (sizes, languages).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from feedback.errors import InputError, nearest

__all__ = ["LICENSES", "check_languages", "check_license", "header", "size_category"]

LICENSES = frozenset((
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0",
    "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl",
    "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl",
    "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa",
    "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "apple-ascl", "intel-research",
    "unknown", "other",
))  # fmt: skip
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_SPECIAL_LANGUAGES = ("code", "multilingual")
_REPOSITORY = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?")


def check_license(license: str) -> str:
    """Return a licence identifier that the Hub knows.

    Raises:
        InputError: it knows no such licence; names the nearest.
    """
    if license not in LICENSES:
        raise InputError(
            f"license {license!r} is none that the Hub knows{nearest(license, LICENSES)} "
            "(list: https://huggingface.co/docs/hub/repositories-licenses; else say 'other')"
        )
    return license


def check_languages(languages: Iterable[str]) -> list[str]:
    """Return language codes as the Hub wants them: ISO 639, two or three small letters.

    Raises:
        InputError: one is not such a code.
    """
    kept = list(languages)
    for language in kept:
        if not _LANGUAGE.fullmatch(language) and language not in _SPECIAL_LANGUAGES:
            raise InputError(
                f"language {language!r} is not an ISO 639 code such as 'en' or 'deu' "
                f"(nor {' or '.join(_SPECIAL_LANGUAGES)})"
            )
    return kept


def size_category(rows: int) -> str:
    """Return the Hub's class of a number of rows."""
    return next((name for limit, name in _SIZES if rows < limit), "1B<n<10B")


def is_repository(name: str) -> bool:
    """Return whether a name can be a repository of the Hub, as ``base_model`` must be."""
    return _REPOSITORY.fullmatch(name) is not None


def header(entries: Mapping[str, Any]) -> str:
    """Return a YAML header between its marks; entries that are None or empty are left out."""
    import yaml

    kept = {key: value for key, value in entries.items() if value not in (None, "", [], ())}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"
