"""Prompts of evaluation sets are found, whole or in part, and common phrases are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedback.errors import InputError
from feedback.overlap import EvaluationSets, Hit, load_evaluation_sets, shipped_sets, write_hashes

LONG = (
    "Describe in your own words why the harbour of a small town in the north freezes every winter "
    "and what its fishermen do about it."
)


def test_exact_hits_ignore_case_space_and_punctuation() -> None:
    sets = EvaluationSets()
    sets.add("mine", "What are the names of the planets?")
    assert sets.find("  what are THE names of -- the planets") == Hit("mine", "exact")
    assert sets.find("What are the names of the dwarf planets?") is None


def test_a_shared_run_of_words_is_a_hit() -> None:
    sets = EvaluationSets()
    sets.add("mine", LONG)
    inside = "Please answer this: " + " ".join(LONG.split()[2:18]) + ". Be brief."
    assert sets.find(inside) == Hit("mine", "ngram")
    assert sets.find(" ".join(LONG.split()[:12])) is None


def test_only_user_turns_count_and_short_ones_do_not() -> None:
    sets = EvaluationSets()
    sets.add("mine", LONG)
    sets.add("mine", "hello there")
    assert sets.find("hello there") is None
    said = [{"role": "assistant", "content": LONG}, {"role": "user", "content": "Thanks a lot!"}]
    assert sets.find(said) is None  # type: ignore[arg-type]


def test_files_round_trip(tmp_path: Path) -> None:
    assert write_hashes(tmp_path / "hashed.txt", [LONG], about="a test") == 1
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "Name all colours of light"}))
    sets = load_evaluation_sets([tmp_path / "hashed.txt", tmp_path / "plain.jsonl"])
    assert sets.find(LONG) == Hit("hashed", "exact")
    assert sets.find("Name all colours of light.") == Hit("plain", "exact")
    assert "harbour" not in (tmp_path / "hashed.txt").read_text()


def test_bad_files_name_the_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("# fine\nexact 12\n")
    with pytest.raises(InputError, match=r"bad\.txt:2: each line"):
        load_evaluation_sets([bad])
    with pytest.raises(InputError, match="no such evaluation set"):
        load_evaluation_sets([tmp_path / "none.jsonl"])


def test_shipped_lists_load() -> None:
    assert shipped_sets()
    assert load_evaluation_sets(shipped_sets()).exact
