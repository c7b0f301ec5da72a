"""The card of a published data set: what it is, how it was made, and how far to trust it.

Everything said comes from the manifests of the folders and, where it lies beside them, the judge's
report card; what is not known is said to be unknown. The header is what the Hub validates.

``dataset_card(folders, repo=..., splits=..., details=CardDetails(license="cc-by-4.0"))``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.dataset_card_making import making_sections
from feedback.dataset_card_trust import trust_sections
from feedback.dataset_card_use import rows_section, terms_section, use_sections
from feedback.hub_metadata import check_languages, check_license, header, size_category
from feedback.markdown import code, plain
from feedback.provenance import Origin, origins_of
from feedback.shards import read_manifest

__all__ = ["CONFIGS", "CardDetails", "dataset_card"]

CONFIGS = ("preferences", "rankings", "verdicts", "candidates")
_TAGS = ("rlaif", "preference-data", "llm-as-a-judge", "synthetic")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardDetails:
    """What no manifest knows, and the person who publishes must say."""

    license: str
    """Licence identifier of the Hub, or ``other``."""
    language: tuple[str, ...] = ()
    """ISO 639 codes."""
    judge_terms: str | None = None
    """The terms attached to the judge's outputs, in the user's words."""
    prompt_license: str | None = None
    """Licence of the prompts, in the user's words."""
    tags: tuple[str, ...] = ()
    """Tags besides the card's own."""
    scan_summary: Mapping[str, int] | None = None
    """Findings by kind (email, secret ...); None: the texts were not scanned."""
    redacted: tuple[str, ...] = ()
    """Kinds whose findings were replaced; the other kinds found were allowed to stay."""
    overlap_summary: Mapping[str, int] | None = None
    """Prompts found in evaluation sets, by set; None: not looked for."""
    accepted_bias: tuple[str, ...] = ()
    """Figures of the report card whose failure was accepted for publishing."""
    citation: str | None = None
    """BibTeX or text; None: a plain entry made from the repository's name."""


def dataset_card(
    folders: Sequence[Path],
    *,
    repo: str | None,
    splits: Mapping[str, Mapping[str, int]],
    details: CardDetails,
) -> str:
    """Return README.md of a data set, with its YAML header.

    Args:
        folders: the finished stage folders that are published.
        repo: ``user/name`` on the Hub; None: a local folder.
        splits: rows by config (one of ``CONFIGS``) and split; Parquet lies at
            ``CONFIG/SPLIT-*.parquet``.
        details: what the person who publishes says.

    Raises:
        InputError: the licence or a language is not one that the Hub accepts.
        ShardError: a folder is not finished.
    """
    origins = origins_of(folders)
    manifests = [read_manifest(folder) for folder in folders]
    name = repo.rpartition("/")[2] if repo else "preference-data"
    parts = [
        f"# {plain(name)}",
        _summary(origins, splits),
        *making_sections(origins),
        rows_section(manifests, splits),
        *trust_sections(origins, accepted=details.accepted_bias),
        terms_section(origins, details),
        *use_sections(origins, repo=repo, splits=splits, citation=details.citation),
    ]
    return _header(name, splits, details) + "\n" + "\n\n".join(filter(None, parts)) + "\n"


def _header(name: str, splits: Mapping[str, Mapping[str, int]], details: CardDetails) -> str:
    rows = sum(sum(of_config.values()) for of_config in splits.values())
    tasks = ["text-generation"] + (["text-ranking"] if "rankings" in splits else [])
    return header(
        {
            "pretty_name": name,
            "license": check_license(details.license),
            "language": check_languages(details.language),
            "annotations_creators": ["machine-generated"],
            "language_creators": ["machine-generated"],
            "task_categories": tasks,
            "size_categories": [size_category(rows)],
            "tags": list(dict.fromkeys((*_TAGS, *details.tags))),
            "configs": [_config(config, splits[config]) for config in CONFIGS if config in splits],
        }
    )


def _config(config: str, splits: Mapping[str, int]) -> dict[str, Any]:
    files = [{"split": name, "path": f"{config}/{name}-*.parquet"} for name in splits]
    default = {"default": True} if config == "preferences" else {}
    return {"config_name": config, **default, "data_files": files}


def _summary(origins: Sequence[Origin], splits: Mapping[str, Mapping[str, int]]) -> str:
    """Return what the data set is, in two sentences."""
    parts = [
        f"{sum(of_config.values()):,} {config}" for config, of_config in splits.items() if of_config
    ]
    judges = dict.fromkeys(str(judge["model"]) for one in origins for judge in one.judges)
    by = f" by {', '.join(map(code, judges))}" if judges else " from labels made elsewhere"
    kind = "AI feedback" if judges else "Feedback"
    return (
        f"{kind} on language-model replies: {', '.join(parts)}, labelled{by}. Every label keeps "
        "the probability behind it, and names the verdicts it was made of."
    )
