"""One pass over what is to be published: what must not leave, and what the columns will hold.

Every text of every row is scanned; ids and hashes are not. Prompts are held against evaluation
sets. Only counts and a few masked examples stay in memory.

Knows rows and detectors; nothing of Parquet or hubs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from feedback.overlap import EvaluationSets
from feedback.progress import ProgressBar
from feedback.publish_schema import holds_messages
from feedback.records import (
    Candidates,
    Message,
    Preference,
    PromptText,
    Ranking,
    Verdict,
    normalise_text,
)
from feedback.scan import Example, ScanReport, Span, find, redact

__all__ = ["Survey", "cleaned", "describe", "rewrite", "survey", "texts_of"]

_EXAMPLES = 5
# Ids and hashes: digits and hexadecimal letters, at least one of them a letter.
_ID = re.compile(r"(?=[0-9-]*[a-fA-F])[0-9a-fA-F-]{8,}")
Rewrite = Callable[[str, str], str]
"""From a field's name and its text to the new text."""


@dataclass(slots=True)
class Survey:
    """What one pass over all rows found."""

    report: ScanReport = field(default_factory=ScanReport)
    messages: dict[str, bool] = field(default_factory=dict)
    """Config -> some row holds chat messages."""
    overlap: dict[str, set[str]] = field(default_factory=dict)
    """Evaluation set -> ids of prompts that occur in it."""

    @property
    def evaluation_prompts(self) -> set[str]:
        """Return the ids of all prompts that occur in any evaluation set."""
        return set().union(*self.overlap.values())


def texts_of(row: Any) -> Iterator[tuple[str, str]]:
    """Yield every text of a row that a person or a model wrote, with its field's name."""

    def collect(name: str, text: str) -> str:
        found.append((name, text))
        return text

    found: list[tuple[str, str]] = []
    rewrite(row, collect)
    yield from found


def rewrite(row: Any, change: Rewrite) -> Any:
    """Return the row with ``change`` applied to each of its texts."""
    if isinstance(row, Preference):
        return replace(
            row,
            prompt=_text("prompt", row.prompt, change),
            chosen=_text("chosen", row.chosen, change),
            rejected=_text("rejected", row.rejected, change),
            source=_free("source", row.source, change),
        )
    if isinstance(row, Ranking):
        return replace(
            row,
            prompt=_text("prompt", row.prompt, change),
            completions=[change("completions", text) for text in row.completions],
            source=_free("source", row.source, change),
        )
    if isinstance(row, Candidates):
        return _rewrite_candidates(row, change)
    assert isinstance(row, Verdict), row
    return replace(
        row,
        judge=replace(row.judge, model=change("judge", row.judge.model)),
        reply=change("reply", row.reply),
        rationale=_optional("rationale", row.rationale, change),
        principle=_optional("principle", row.principle, change),
        error=_optional("error", row.error, change),
        sampling=_free("sampling", row.sampling, change),
        meta=_free("meta", row.meta, change),
    )


def _rewrite_candidates(row: Candidates, change: Rewrite) -> Candidates:
    return replace(
        row,
        prompt=_text("prompt", row.prompt, change),
        completions=[
            replace(
                entry,
                completion=change("completions", entry.completion),
                model=change("model", entry.model),
                sampling=_free("sampling", entry.sampling, change),
            )
            for entry in row.completions
        ],
        gold=_optional("gold", row.gold, change),
        meta=_free("meta", row.meta, change),
    )


def _optional(name: str, text: str | None, change: Rewrite) -> str | None:
    return None if text is None else change(name, text)


def _text(name: str, text: PromptText, change: Rewrite) -> PromptText:
    if isinstance(text, str):
        return change(name, text)
    return [Message(role=turn["role"], content=change(name, turn["content"])) for turn in text]


def _free(name: str, value: Any, change: Rewrite) -> Any:
    """Apply ``change`` to the texts inside a free-form field; ids and hashes stay."""
    if isinstance(value, str):
        return value if _ID.fullmatch(value) else change(name, value)
    if isinstance(value, dict):
        return {key: _free(f"{name}.{key}", inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_free(name, inner, change) for inner in value]
    return value


# Pairs of one prompt repeat its texts, and lie side by side.
@lru_cache(maxsize=4096)
def _spans(text: str, region: str) -> tuple[Span, ...]:
    return tuple(find(text, region))


def survey(
    sources: Iterable[tuple[str, Iterator[Any]]],
    sets: EvaluationSets,
    *,
    region: str = "US",
    bar: ProgressBar,
) -> Survey:
    """Read every row once.

    Args:
        sources: config and rows of each folder.
        sets: evaluation sets whose prompts must not be among these.
        region: country whose phone numbers may be written without a country code.
        bar: advanced by one step per row.
    """
    found = Survey()
    for config, rows in sources:
        found.messages.setdefault(config, False)
        last: Any = None
        for row in rows:
            found.messages[config] = found.messages[config] or holds_messages(row)
            _scan_row(row, found.report, region)
            prompt = getattr(row, "prompt", None)
            if prompt is not None and prompt != last:
                last = prompt
                _hold_against(row.prompt_id, prompt, sets, found)
            bar.advance()
    return found


def _scan_row(row: Any, report: ScanReport, region: str) -> None:
    report.rows += 1
    kinds = set()
    for name, text in texts_of(row):
        for span in _spans(text, region):
            kinds.add(span.kind)
            report.counts[span.kind] += 1
            shown = report.examples.setdefault(span.kind, [])
            if len(shown) < _EXAMPLES:
                shown.append(_example(row, name, text, span))
    report.rows_with.update(kinds)


def _example(row: Any, name: str, text: str, span: Span) -> Example:
    row_id = row.verdict_id if isinstance(row, Verdict) else row.prompt_id
    return Example(row_id, name, f"{text[span.start : span.start + 3]}... "
                   f"({span.end - span.start} characters)")  # fmt: skip


def _hold_against(prompt_id: str, prompt: PromptText, sets: EvaluationSets, found: Survey) -> None:
    hit = sets.find(prompt)
    if hit is None:
        return
    known = found.overlap.setdefault(hit.name, set())
    if prompt_id not in known:
        known.add(prompt_id)
        report = found.report
        report.counts["evaluation"] += 1
        shown = report.examples.setdefault("evaluation", [])
        if len(shown) < _EXAMPLES:
            shown.append(Example(prompt_id, "prompt", f"{hit.how} overlap with {hit.name}"))


def cleaned(
    row: Any, kinds: Iterable[str], drop: set[str], counts: Counter[str], *, region: str = "US"
) -> Any | None:
    """Return a row fit to leave, or None where it cannot be.

    Args:
        row: any row.
        kinds: of findings that are replaced by their names.
        drop: ids of prompts whose rows are left out.
        counts: gets what was left out, and why.
        region: as in ``survey``.
    """
    if row.prompt_id in drop:
        counts["rows of prompts in evaluation sets left out"] += 1
        return None
    wanted = frozenset(kinds)
    if not wanted:
        return row

    def change(_: str, text: str) -> str:
        spans = [span for span in _spans(text, region) if span.kind in wanted]
        return redact(text, spans) if spans else text

    row = rewrite(row, change)
    if isinstance(row, Preference) and _flat(row.chosen) == _flat(row.rejected):
        counts["pairs left out that redaction made equal"] += 1
        return None
    return row


def _flat(text: PromptText) -> str:
    plain = text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)
    return normalise_text(plain)


def describe(report: ScanReport, counts: Mapping[str, int]) -> Iterator[str]:
    """Yield one line per kind found, with masked examples by row id."""
    for kind, number in counts.items():
        rows = f" in {report.rows_with[kind]:,} rows" if kind in report.rows_with else " prompts"
        shown = "; ".join(
            f"{example.row_id} {example.field}: {example.excerpt}"
            for example in report.examples.get(kind, [])
        )
        yield f"  {kind}: {number:,}{rows} ({shown})"
