"""Judgments and preferences made elsewhere, as folders that every other command reads.

``rlaif import FILE --format mt_bench --out runs/audit`` writes ``candidates`` (where the file has
texts), ``verdicts``, ``gold`` (where it says who is right) and ``preferences`` (where it is
training data): any judge can be audited, and existing data judged anew. A format is one function
from a source to ``Judged`` rows, named in ``FORMATS``.

What a file does not say is not invented: a format that does not record which answer stood first
gives verdicts flagged ``order_unknown``, and the report card then says nothing about position.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback.config import recipe_of
from feedback.errors import InputError, RecipeError, nearest
from feedback.records import (
    ORDER_UNKNOWN,
    Candidates,
    Completion,
    GoldPair,
    JudgeIdentity,
    Outcome,
    Preference,
    PromptText,
    Verdict,
    content_id,
)
from feedback.shards import ShardWriter, shard_paths

__all__ = [
    "FORMATS",
    "ImportOptions",
    "Importer",
    "Judged",
    "completion_of",
    "read_objects",
    "run",
    "text_field",
    "verdict_of",
]

FORMATS: dict[str, str] = {
    "pairs": "feedback.import_pairs:read_pairs",
    "alpaca_eval": "feedback.import_benchmarks:read_alpaca_eval",
    "llmbar": "feedback.import_benchmarks:read_llmbar",
    "reward_bench": "feedback.import_benchmarks:read_reward_bench",
    "mt_bench": "feedback.import_arenas:read_mt_bench",
    "arena_hard": "feedback.import_arenas:read_arena_hard",
    "trl": "feedback.import_preferences:read_trl",
    "hh": "feedback.import_preferences:read_hh",
    "ultrafeedback": "feedback.import_preferences:read_ultrafeedback",
    "published": "feedback.import_published:write_published",
}
"""Format -> ``module:function``; the function is an ``Importer`` (``published`` writes the folders
itself). Loaded when it is used."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Judgments made elsewhere -> candidates, verdicts and gold pairs."""

    source: Path
    """File (JSON, JSONL, either may be gzipped) or folder of the format; for pairs, trl, hh,
    ultrafeedback and published also Parquet, or a data set on disk or on the Hub (user/name)."""
    format: str = "pairs"
    """pairs, alpaca_eval, llmbar, reward_bench, mt_bench, arena_hard, trl, hh, ultrafeedback,
    published."""
    out: Path
    """Folder that gets candidates/, verdicts/, gold/ and preferences/."""
    config: str | None = None
    """Data set: its config; None: the default one (published: all)."""
    split: str | None = None
    """Data set: its split; None: train (published: all)."""
    revision: str | None = None
    """Data set on the Hub: commit or tag."""
    judge: str | None = None
    """The judge's name, where the file does not say it."""
    template: str | None = None
    """Name of the template the judge was asked with; None: the format's."""
    model: str = "unknown"
    """trl, hh, ultrafeedback: who wrote the completions, where the rows do not say it."""
    questions: Path | None = None
    """mt_bench, arena_hard: the benchmark's question.jsonl, for the prompts' texts."""
    answers: Path | None = None
    """mt_bench, arena_hard: the folder model_answer, for the completions' texts."""
    column_id: str = "prompt_id"
    """Column that names the prompt; absent: a hash of the prompt."""
    column_prompt: str = "prompt"
    """pairs, trl: column of the prompt (text or messages)."""
    column_chosen: str = "chosen"
    """trl, hh: column of the better completion, or of the dialogue that ends with it."""
    column_rejected: str = "rejected"
    """trl, hh: column of the worse one."""
    column_a: str = "a"
    """pairs: column of the completion shown first (text)."""
    column_b: str = "b"
    """pairs: column of the completion shown second (text)."""
    column_model_a: str = "model_a"
    """pairs: column that says who wrote a; also a's id where there is no text."""
    column_model_b: str = "model_b"
    """pairs: column that says who wrote b."""
    column_verdict: str = "verdict"
    """pairs: column of the verdict with a shown first."""
    column_verdict_swapped: str = "verdict_swapped"
    """pairs: column of the verdict with b shown first, where one row holds both orders."""
    column_probability: str = "p"
    """pairs: column of P(a preferred) with a shown first."""
    column_probability_swapped: str = "p_swapped"
    """pairs: column of P(a preferred) with b shown first."""
    column_judge: str = "judge"
    """pairs: column of the judge's name; --judge where there is none."""
    column_gold: str = "gold"
    """pairs: column of the gold label: one of the words below, about the candidates."""
    column_votes: str = "votes"
    """pairs: column with a list of people's labels."""
    verdict_names: str = "slot"
    """pairs: what the words of the verdict columns name: slot (the first word is whichever stood
    first) or candidate (the first word is a, also after the swap)."""
    words_first: tuple[str, ...] = ("a", "A", "1", "first", "model_a")
    """pairs: words for the first."""
    words_second: tuple[str, ...] = ("b", "B", "2", "second", "model_b")
    """pairs: words for the second."""
    words_tie: tuple[str, ...] = ("tie", "C", "3", "both", "0", "equal")
    """pairs: words for a tie; everything else counts as unparsed."""

    @property
    def source_name(self) -> str:
        """The source as rows and manifests name it: a file's own name, or ``user/name``."""
        return self.source.name if self.source.exists() else str(self.source)

    def __post_init__(self) -> None:
        """Refuse formats and values that do not exist."""
        if self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise RecipeError(
                f"unknown format {self.format!r}{nearest(self.format, FORMATS)} (known: {known})"
            )
        if self.verdict_names not in ("slot", "candidate"):
            raise RecipeError(f"verdict_names is {self.verdict_names!r}; slot or candidate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a format's function yields: one or more verdicts about completions of one prompt."""

    prompt_id: str
    prompt: PromptText
    completions: list[Completion] = field(default_factory=list)
    """Texts, where the file has them; verdicts may name completions that are not here."""
    verdicts: list[Verdict] = field(default_factory=list)
    gold: list[GoldPair] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""
    """Why the row gives nothing; such rows are counted and said."""


Importer = Callable[[ImportOptions], Iterator[Judged]]


def run(options: ImportOptions) -> None:
    """Write the folders and say what came in.

    Raises:
        InputError: the source is missing, or a row is not of the format; names file and line.
        ShardError: the output folder already holds rows.
    """
    from feedback.progress import say

    module, _, name = FORMATS[options.format].partition(":")
    function = getattr(importlib.import_module(module), name)
    left_out: Counter[str] = Counter()
    if options.format == "published":
        counts = function(options)
    else:
        counts = write_judged(_counted(function(options), left_out), options)
    if not counts:
        raise InputError("holds no rows of this format", path=options.source)
    parts = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    say(f"{options.out}: {parts}")
    for why, count in left_out.most_common():
        say(f"  left out: {count:,} pairs that are {why}")
    if counts["verdicts"]:
        say(f"next: rlaif report {options.out / 'verdicts'}")


def _counted(rows: Iterable[Judged], left_out: Counter[str]) -> Iterator[Judged]:
    """Yield the rows that give something; count the others by why they do not."""
    for row in rows:
        if row.left_out:
            left_out[row.left_out] += 1
        else:
            yield row


def write_judged(rows: Iterable[Judged], options: ImportOptions) -> Counter[str]:
    """Write rows as folders of candidates, verdicts, gold, preferences; return how many of each."""
    prompts: dict[str, Candidates] = {}
    known: dict[str, dict[str, Completion]] = {}
    verdicts: dict[str, Verdict] = {}
    gold: dict[tuple[str, str, str], GoldPair] = {}
    preferences: list[Preference] = []
    for row in rows:
        prompts.setdefault(
            row.prompt_id,
            Candidates(prompt_id=row.prompt_id, prompt=row.prompt, completions=[], meta=row.meta),
        )
        for completion in row.completions:
            known.setdefault(row.prompt_id, {})[completion.completion_id] = completion
        verdicts |= {verdict.verdict_id: verdict for verdict in row.verdicts}
        for pair in row.gold:
            gold[pair.prompt_id, min(pair.a, pair.b), max(pair.a, pair.b)] = pair
        preferences += row.preferences
    candidates = [
        Candidates(
            prompt_id=name,
            prompt=prompts[name].prompt,
            completions=list(completions.values()),
            meta=prompts[name].meta,
        )
        for name, completions in known.items()
    ]
    counts: Counter[str] = Counter()
    folders: tuple[tuple[str, list[Any]], ...] = (
        ("candidates", candidates),
        ("verdicts", list(verdicts.values())),
        ("gold", list(gold.values())),
        ("preferences", preferences),
    )
    for kind, records in folders:
        if records:
            _write(options, kind, records)
            counts[kind] = len(records)
    return counts


def _write(options: ImportOptions, kind: str, records: list[Any]) -> None:
    folder = options.out / kind
    if folder.is_dir() and shard_paths(folder, kind):
        raise InputError("already holds rows; import into a new folder", path=folder)
    info: dict[str, Any] = {
        "stage": "import",
        "format": options.format,
        "recipe": recipe_of(options),
        "source": options.source_name,
        "revision": options.revision,
    }
    count = None
    if kind == "verdicts":
        info |= {
            "judge": {"model": records[0].judge.model},
            "template": {"name": records[0].template},
        }
        if criteria := sorted({record.meta.get("criterion", "") for record in records} - {""}):
            info["criteria"] = dict.fromkeys(criteria, 1.0)

        def count(verdict: Verdict) -> str:
            return verdict.outcome

    with ShardWriter[Any](folder, kind) as writer:
        for record in records:
            writer.append(record)
        writer.finish(info, count=count)


# --- what formats share ----------------------------------------------------------------------


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or place, object) of a JSON list, or of JSON lines; gzip by name.

    Raises:
        InputError: the file is missing, is neither, or an entry is not an object.
    """
    if not path.is_file():
        raise InputError("no such file", path=path)
    with (
        gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw,
        io.TextIOWrapper(raw, encoding="utf-8") as file,
    ):
        start = file.read(1)
        while start and start.isspace():
            start = file.read(1)
        if start == "[":
            yield from _list_entries(start + file.read(), path)
            return
        first = start + file.readline()
        number = 0
        for number, line in enumerate(_chain(first, file), start=1):
            if line.strip():
                yield number, _object(line, path, number)


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _list_entries(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", path=path) from error
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise InputError("entry is not an object", path=path, line=number)
        yield number, entry


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", path=path, line=number) from error
    if not isinstance(value, dict):
        raise InputError("row is not an object", path=path, line=number)
    return value


def text_field(row: dict[str, Any], name: str, path: Path, number: int) -> str:
    """Return a text field of a row.

    Raises:
        InputError: it is missing or not text; names the nearest field there is.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    if name not in row:
        raise InputError(f"field {name!r} is missing{nearest(name, row)}", path=path, line=number)
    raise InputError(f"field {name!r} is {value!r}, not text", path=path, line=number)


def completion_of(text: str, model: str) -> Completion:
    """Return a completion whose id names its author and its text."""
    return Completion(
        completion_id=f"{model}:{content_id(text, length=10)}", completion=text, model=model
    )


def verdict_of(
    *,
    judge: str,
    template: str,
    prompt_id: str,
    shown: tuple[str, str],
    winner: str | None,
    outcome: Outcome | None = None,
    p_first: float | None = None,
    reply: str = "",
    order_known: bool = True,
    repeat: int = 0,
    meta: dict[str, Any] | None = None,
) -> Verdict:
    """Return a pairwise verdict of an import.

    Args:
        judge: the judge's name.
        template: name of the template.
        prompt_id: the prompt.
        shown: completion ids in the order shown.
        winner: completion id; None: a tie, unless ``outcome`` says something else.
        outcome: None: decided with a winner, else a tie.
        p_first: P(first shown preferred), where the judge gave it.
        reply: what the judge wrote.
        order_known: False flags that ``shown`` may be the other way round.
        repeat: which repetition.
        meta: slice fields of this verdict alone.
    """
    decided: Outcome = outcome or ("tie" if winner is None else "decided")
    return Verdict(
        verdict_id=content_id("import", judge, template, prompt_id, shown, repeat),
        prompt_id=prompt_id,
        kind="pairwise",
        shown=list(shown),
        outcome=decided,
        judge=JudgeIdentity(model=judge),
        template=template,
        template_sha256="",
        probs=None if p_first is None else [p_first, 1 - p_first],
        winner=winner if decided == "decided" else None,
        reply=reply,
        flags=[] if order_known else [ORDER_UNKNOWN],
        repeat=repeat,
        meta=meta or {},
    )
