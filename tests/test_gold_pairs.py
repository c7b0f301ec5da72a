"""The project's own gold pairs: what they claim to be, and that anybody can write them again."""

from __future__ import annotations

from collections import Counter

from feedback.goldcheck import gold_score
from feedback.records import Candidates, GoldPair, normalise_text, prompt_messages
from feedback.shards import read_jsonl
from recipes.pocket_model.gold_pairs import GOLD, make_gold
from recipes.pocket_model.prompts import banned_openings


def read() -> list[tuple[Candidates, GoldPair, str, str]]:
    """Rows with the sound reply and the flawed one."""
    found = []
    rows = read_jsonl(GOLD / "booking-candidates.jsonl", Candidates)
    gold = read_jsonl(GOLD / "booking-gold.jsonl", GoldPair)
    for row, pair in zip(rows, gold, strict=True):
        texts = {one.completion_id: one.completion for one in row.completions}
        found.append((row, pair, texts[pair.a], texts[pair.b]))
    return found


def test_the_files_are_what_the_script_writes() -> None:
    candidates, gold = make_gold()
    assert [row for row, *_ in read()] == candidates
    assert [pair for _, pair, *_ in read()] == gold


def test_the_sound_reply_is_known_and_neither_place_nor_length_tells() -> None:
    rows = read()
    assert len(rows) == len({row.prompt_id for row, *_ in rows}) == 320
    scores = [
        (gold_score(row.meta, good, ended=True), gold_score(row.meta, bad, ended=True))
        for row, _, good, bad in rows
    ]
    assert all(good == 1.0 for good, _ in scores)
    assert sum(bad < 1.0 for _, bad in scores) >= 316
    longer = Counter((row.meta["flaw"], len(good) > len(bad)) for row, _, good, bad in rows)
    assert set(longer.values()) <= {22, 23} and len(longer) == 14
    first = sum(row.completions[0].completion_id == pair.a for row, pair, *_ in rows)
    assert 130 <= first <= 190


def test_no_conversation_begins_like_one_of_the_prompt_sets() -> None:
    openings = {normalise_text(prompt_messages(row.prompt)[0]["content"]) for row, *_ in read()}
    assert len(openings) == 320
    assert not openings & banned_openings()
