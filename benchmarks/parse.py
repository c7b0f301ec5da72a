"""Read recorded replies of published judges and compare with the verdicts stored beside them.

    python benchmarks/parse.py [--data ../shared/data] [--out benchmarks/results/parse.json]

Counted is every row whose record holds what a check needs. Not counted, and listed row by row:

* ``verdict stored apart``: the text is the reason or the feedback only; no reader can find the
  verdict in it without guessing. What a reader does find there is reported as it is.
* ``shown order not recorded``: the reply names "m" or "M" and the record does not say which output
  was which. alpaca_eval draws the order from the prompt's text, so most can be worked out; for the
  files whose rows are not numbered by prompt, and for another template's names, it cannot.

An unread reply agrees with a stored "no verdict" (null, -1, garbage) and with nothing else.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from result_file import cpu, write_result

from feedback.reading import Reading
from feedback.reply_styles import read_reply

STYLE_OF_SOURCE = {
    "qlora_threeclass": "three-class",
    "qlora_scores": "two-scores",
    "fastchat_table": "two-scores",
    "llmzoo_ranking": "chain",
    "pandalm_gpt35": "reason",
    "arena_bench_single": "single-rating",
    "prometheus_gpt4": "feedback",
    "wildbench_json": "json-score",
    "alpaca_eval_fn": "ordered-models",
}
STORED_APART = ("pandalm_gpt35", "prometheus_gpt4")


class Row(NamedTuple):
    """One reply, what was read, what was stored, and whether a check is possible."""

    row_id: str
    source: str
    read: Any
    stored: Any
    checkable: str
    """Empty where it is; else why not."""
    reason: str


def stored_verdict(row: dict[str, Any]) -> Any:
    """Return the stored verdict in the form that ``read_verdict`` gives; None for no verdict."""
    value = row["verdict"]
    if row["source"] in ("qlora_scores", "fastchat_table"):
        scores = [float(score) for score in value]
        return None if min(scores) < 0 else scores
    if row["source"] == "pandalm_gpt35":
        return None if value == "garbage" else value
    if value in (None, -1):
        return None
    return value if isinstance(value, list) else float(value)


def read_verdict(reading: Reading, row: dict[str, Any]) -> Any:
    """Return a reading in the stored form; None for no verdict."""
    source = row["source"]
    if not reading.has_verdict:
        return None
    if source in ("qlora_scores", "fastchat_table"):
        return [reading.scores["1"], reading.scores["2"]]
    if source == "llmzoo_ranking":
        return competition_ranks(reading.ranking or [], len(row["verdict"]))
    if source == "alpaca_eval_fn":
        return reading.label
    if source == "pandalm_gpt35":
        return reading.label
    value = reading.score if reading.score is not None else reading.label
    return None if value is None else float(value)


def competition_ranks(groups: list[list[str]], count: int) -> list[int | None]:
    """Return each assistant's rank, ties sharing the best place (1, 2, 2, 4)."""
    ranks: dict[str, int] = {}
    place = 1
    for group in groups:
        ranks |= dict.fromkeys(group, place)
        place += len(group)
    return [ranks.get(str(number)) for number in range(1, count + 1)]


def unshuffle(model: str | None, row: dict[str, Any], prompts: dict[int, str]) -> tuple[Any, str]:
    """Return (1.0 or 2.0 for the named model, why it cannot be known)."""
    if model is None or model == "tie":
        return model, ""
    mapping = (row.get("meta") or {}) if isinstance(row.get("meta"), dict) else {}
    if model in mapping:
        return float(mapping[model].removeprefix("output_")), ""
    if model not in ("m", "M") or not prompts:
        return None, "shown order not recorded"
    name, number = row["id"].split("/")[-3], int(row["id"].split("/")[-1])
    if name in ROWS_NOT_BY_PROMPT:
        return None, "shown order not recorded"
    # Their documented draw: a coin from the prompt's text; "m" is the first shown.
    switched = random.Random(f"is_switched_outputs{prompts[number]}0").choices([False, True])[0]
    first = model == "m"
    return (2.0 if first == switched else 1.0), ""


# Files of these models number their rows otherwise than by prompt: in them, and only in them, the
# order worked out from the prompt of that number agrees with the stored one as often as a coin.
ROWS_NOT_BY_PROMPT = (
    "claude-2",
    "claude-2.1",
    "gpt4",
    "llama-2-70b-chat-hf",
    "tulu-2-dpo-70b",
    "Yi-34B-Chat",
)


def check(row: dict[str, Any], prompts: dict[int, str]) -> Row:
    """Read one row and set it beside the stored verdict."""
    source = row["source"]
    shown = len(row["verdict"]) if source == "llmzoo_ranking" else 2
    reading = read_reply(STYLE_OF_SOURCE[source], row["text"], shown=shown)
    read, checkable = read_verdict(reading, row), ""
    if source in STORED_APART:
        checkable = "verdict stored apart"
    elif source == "alpaca_eval_fn":
        read, checkable = unshuffle(read, row, prompts)
    return Row(row["id"], source, read, stored_verdict(row), checkable, reading.reason)


def read_rows(data: Path) -> Iterator[Row]:
    """Stream all checked rows."""
    with gzip.open(data / "alpaca_eval_prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        prompts = {row["p"]: row["prompt"] for row in map(json.loads, file)}
    with gzip.open(data / "judge_replies.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield check(json.loads(line), prompts)


def why(row: Row, text: Any) -> str:
    """Return why a row disagrees, in words."""
    if row.source == "arena_bench_single" and isinstance(text, list):
        return "stored is null for replies kept as a list of turns; the text ends in a rating"
    if row.source == "arena_bench_single" and row.read is None:
        return "a number is stored, and the text is cut off before any rating"
    if row.source in ("qlora_scores", "fastchat_table") and row.read is not None:
        return "the stored scores are not those that the text states"
    if row.source in ("qlora_scores", "fastchat_table"):
        return "the text scores only one of the two outright"
    if row.source == "llmzoo_ranking" and row.read is None:
        return "prose without a chain, or a chain without some of the assistants"
    if row.source == "llmzoo_ranking" and "=<" in str(text)[-80:]:
        return "stored the other way round than the text's prose and its chain ('=<') say"
    if row.source == "llmzoo_ranking":
        return "the stored ranks are not those of the text's final chain"
    if row.source == "alpaca_eval_fn" and row.read == "tie":
        return "both models are ranked first; the one listed first was stored"
    return "see the row"


class Summary(NamedTuple):
    """What came of all rows."""

    figures: dict[str, float]
    sources: list[dict[str, Any]]
    disagreements: list[dict[str, Any]]
    left_out: dict[str, dict[str, list[str]]]
    """Ids of the rows that were not checked, by source and reason."""


def summarise(data: Path) -> Summary:
    """Check all rows, and count."""
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    disagreements = []
    left_out: dict[str, dict[str, list[str]]] = {}
    with gzip.open(data / "judge_replies.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = (json.loads(line)["text"] for line in file)
        for row, text in zip(read_rows(data), texts, strict=True):
            verdict = (
                "agree" if row.read == row.stored else "unread" if row.read is None else "differ"
            )
            table[row.source][f"{row.checkable or 'checked'}: {verdict}"] += 1
            if row.checkable:
                reasons = left_out.setdefault(row.source, {})
                reasons.setdefault(row.checkable, []).append(row.row_id)
            if verdict != "agree" and not row.checkable:
                disagreements.append(
                    {
                        "row": row.row_id,
                        "source": row.source,
                        "read": row.read,
                        "stored": row.stored,
                        "reason": why(row, text),
                    }
                )
    totals = sum(table.values(), collections.Counter())
    counted = sum(count for key, count in totals.items() if key.startswith("checked"))
    agreeing = sum(count for key, count in totals.items() if key.endswith(": agree"))
    figures = {
        "agreement": round(totals["checked: agree"] / counted, 5),
        "rows": counted,
        "rows_all": totals.total(),
        "agreement_all_rows": round(agreeing / totals.total(), 5),
        "read_otherwise": totals["checked: differ"],
        "unread": totals["checked: unread"],
        "left_out": totals.total() - counted,
        "styles": len(set(STYLE_OF_SOURCE.values())),
        "styles_checked": len(
            {
                STYLE_OF_SOURCE[source]
                for source, counts in table.items()
                if any(key.startswith("checked") for key in counts)
            }
        ),
    }
    runs = [
        {"source": source, "style": STYLE_OF_SOURCE[source], **dict(sorted(counts.items()))}
        for source, counts in sorted(table.items())
    ]
    return Summary(figures, runs, disagreements, left_out)


def main() -> None:
    """Measure, print the table, and write the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parse.json"))
    options = parser.parse_args()
    figures, runs, disagreements, left_out = summarise(options.data)
    reasons = collections.Counter((row["source"], row["reason"]) for row in disagreements)
    for run in runs:
        print(run)
    for (source, reason), count in reasons.most_common():
        print(f"{count:4d}  {source}: {reason}")
    print(figures)
    write_result(
        options.out,
        "parse",
        command="python benchmarks/parse.py",
        hardware=cpu(),
        figures=figures,
        runs={
            "sources": runs,
            "reasons": [
                {"source": source, "reason": reason, "rows": count}
                for (source, reason), count in reasons.most_common()
            ],
            "disagreements": disagreements,
            "left_out": left_out,
        },
    )


if __name__ == "__main__":
    main()
