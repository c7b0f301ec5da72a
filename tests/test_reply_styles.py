"""The readers of published judges' reply styles, on invented replies and on recorded ones."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from feedback.reply_styles import STYLES, read_reply, turns_text


def test_three_class():
    assert read_reply("three-class", "Both are fine, the second is kinder.\n\n2").label == "2"
    tie = read_reply("three-class", "Hard to say.\n3")
    assert (tie.outcome, tie.label) == ("tie", "3")
    assert read_reply("three-class", "I like 1 and 2.\n\n4").outcome == "unparsed"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\nThe second explains more.", (8, 9)),
        ("7.5, 7.5", (7.5, 7.5)),
        ("8/10 6/10\nwhy", (8, 6)),
        ("x = (2, -2).\nScores:\nAssistant 1: 10 (right)\nAssistant 2: 4 (wrong)", (10, 4)),
        ("I would give Assistant 1 a score of 4 and Assistant 2 a score of 8.", (4, 8)),
        ("I give a score of 5 to Assistant 1 and a score of 9 to Assistant 2.", (5, 9)),
        ("Assistant 1's score is 3 out of 10, and Assistant 2's score is 10 out of 10.", (3, 10)),
        ("The points (2, 3) matter.\nOutput: (9, 10)", (9, 10)),
        ("The scores for Assistant 1 and Assistant 2 are 4 and 9, respectively.", (4, 9)),
        ("I would rate both Assistant 1 and Assistant 2 a 9 out of 10.", (9, 9)),
        ("Assistant 1: 3\nAssistant 2: 4\nCorrected.\nAssistant 1: 5\nAssistant 2: 2", (5, 2)),
    ],
)
def test_two_scores(text, scores):
    reading = read_reply("two-scores", text)
    assert (reading.scores["1"], reading.scores["2"]) == scores
    expected = "tie" if scores[0] == scores[1] else "1" if scores[0] > scores[1] else "2"
    assert reading.label == expected


@pytest.mark.parametrize(
    "text", ["-1 -1\nno", "The points (2, -2) and (10, 4).", "Assistant 1: 8", "", "Fine answers."]
)
def test_two_scores_not_stated(text):
    assert read_reply("two-scores", text).label is None


def test_chain():
    text = "First Assistant 1 > Assistant 2.\nOrder: Assistant 3 > [Assistant 1] = Assistant 2."
    assert read_reply("chain", text, shown=3).ranking == [["3"], ["1", "2"]]
    equal = "In this respect both assistants are equally good."
    assert read_reply("chain", equal, shown=2).ranking == [["1", "2"]]
    for unread in ("Assistant 1 =< Assistant 2", "Assistant 2 > Assistant 3", "All are good."):
        assert read_reply("chain", unread, shown=3).outcome == "unparsed"


@pytest.mark.parametrize(
    ("text", "ranking"),
    [
        ("Assistant 1 < Assistant 2", [["2"], ["1"]]),
        ("So the order is: [Assistant 1] =< [Assistant 2].", [["2"], ["1"]]),
        ("Assistant 1 <= Assistant 2", [["2"], ["1"]]),
        ("Assistant 2 ≥ Assistant 1", [["2"], ["1"]]),
        ("First Assistant 1 > Assistant 2. No: Assistant 1 =< Assistant 2", [["2"], ["1"]]),
        ("Assistant 1 = Assistant 2", [["1", "2"]]),
    ],
)
def test_chains_in_other_signs(text, ranking):
    assert read_reply("chain", text, shown=2).ranking == ranking


def test_chains_of_several_signs():
    text = "Assistant 1 > Assistant 4 >= Assistant 2 = Assistant 3"
    assert read_reply("chain", text, shown=4).ranking == [["1"], ["4"], ["2", "3"]]
    text = "Assistant 3 = Assistant 2 =< Assistant 4 < Assistant 1"
    assert read_reply("chain", text, shown=4).ranking == [["1"], ["4"], ["2", "3"]]
    both_ways = "Assistant 1 > Assistant 2 < Assistant 3"
    assert read_reply("chain", both_ways, shown=3).outcome == "unparsed"


def test_reason_reads_only_an_outright_statement():
    assert read_reply("reason", "Response 2 is better because it is short.").label == "2"
    for unread in (
        "Response 1 is incorrect.",
        "Response 1 is not better than the other.",
        "Response 1 is better for children, Response 2 is better for adults.",
        "Both responses are fine.",
    ):
        assert read_reply("reason", unread).label is None


def test_ratings():
    assert read_reply("single-rating", "Good.\n\nRating: [[7]]").score == 7
    assert read_reply("single-rating", "First [[3]], then [[10]]").score == 10
    assert read_reply("single-rating", "Rating: [[7.5]]").outcome == "unparsed"
    assert read_reply("single-rating", [{"index": 0, "turns": ["a", "Rating: [[4]]"]}]).score == 4
    assert read_reply("feedback", "Clear. So the overall score is 4.").score == 4
    assert read_reply("feedback", "It shows a score of good music.").outcome == "unparsed"
    assert read_reply("json-score", '{"strengths": "x", "score": "10"}').score == 10
    assert read_reply("json-score", '{"strengths": "x", "score": "11"}').outcome == "unparsed"
    assert turns_text(None) == ""


def test_ordered_models():
    rows = '[{"model": "m", "rank": 2}, {"model": "M", "rank": 1}]'
    reading = read_reply("ordered-models", '{"ordered_models": ' + rows + "}")
    assert (reading.label, reading.ranking) == ("M", [["M"], ["m"]])
    assert read_reply("ordered-models", rows.replace('"', "'")).label == "M"
    assert read_reply("ordered-models", rows.replace("2", "1")).outcome == "tie"
    for unread in ("[]", "[1, 2]", "open('x')", '{"ordered_models": 3}', "[" * 5000):
        assert read_reply("ordered-models", unread).outcome == "unparsed"


def test_pair_letters():
    assert read_reply("pair-letters", "A is longer.\n\n[[B]]").label == "B"
    assert read_reply("pair-letters", "Same. [[C]]").outcome == "tie"


def test_every_style_survives_nonsense():
    for style in STYLES:
        for text in ("", "\n", "{}", "[[", "\x00", "1" * 5000, None, 7, [{"turns": []}]):
            assert read_reply(style, text).label is None


def test_recorded_replies(shared_data: Path, root: Path):
    """Each source's share of agreement on every tenth recorded reply."""
    spec = importlib.util.spec_from_file_location("bench_parse", root / "benchmarks" / "parse.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    agreed: dict[str, list[bool]] = {}
    with gzip.open(shared_data / "judge_replies.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % 10:
                continue
            row = bench.check(json.loads(line), {})
            if not row.checkable:
                agreed.setdefault(row.source, []).append(row.read == row.stored)
    floors = {"llmzoo_ranking": 0.98, "arena_bench_single": 0.96, "fastchat_table": 0.99}
    for source, results in agreed.items():
        assert sum(results) / len(results) >= floors.get(source, 1.0), source
    assert sum(map(len, agreed.values())) > 1500
