"""Replies to our templates: the last verdict wins, only offered labels count, no guesses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.parsing import (
    last_json_object,
    parse_json,
    parse_listwise,
    parse_pairwise,
    parse_rating,
    parse_reply,
)
from feedback.refusal import is_refusal
from feedback.reply_styles import STYLES, read_reply
from feedback.templates import Template


def template(kind: str = "pairwise", mode: str = "rationale", **fields) -> Template:
    labels = {
        "pairwise": ("A", "B"),
        "listwise": tuple("ABCDEFGH"),
        "rating": ("1", "2", "3", "4", "5"),
    }[kind]
    values = {"name": "t", "user": "", "labels": labels, "max_tokens": 256} | fields
    return Template(kind=kind, mode=mode, **values)


LABEL = template(mode="label", max_tokens=1)
RATIONALE = template()
TIE = template(tie="C")
NUMBERS = template(labels=("1", "2"))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A", "A"),
        (" B", "B"),
        ("**A**", "A"),
        ("[[B]]", "B"),
        ("(A)", "A"),
        ("A.", "A"),
        ("'B'", "B"),
        ("Ａ", "A"),  # full width
        ("a", "A"),
        ("Reply B", "B"),
        ("A\n\nReply A answers the question.", "A"),
        ("B because it is correct", "B"),
        ("A is better.", "A"),
        ("B > A", "B"),
        ("A < B", "B"),
        ("<think>B looks fine. Verdict: B</think>A", "A"),
        ("A\nA", "A"),
    ],
)
def test_label_mode_reads_the_label(text, label):
    reading = parse_pairwise(text, LABEL, finish_reason="length")
    assert (reading.outcome, reading.label) == ("decided", label)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "***",
        "I",
        "C",
        "А",  # Cyrillic
        "A or B",
        "A/B",
        "A and B",
        "A, B",
        "A\nB",
        "AB",
        "A reply that helps",
        "A's tone is kinder",
        "A is worse than B",
        "A is not better",
        "A has errors, B is better",
        "Neither",
        "-1",
        "tie",
        "Both are good",
        "<think>Verdict: A",
        "0.5",
    ],
)
def test_label_mode_never_guesses(text):
    reading = parse_pairwise(text, LABEL)
    assert reading.outcome == "unparsed"
    assert reading.label is None
    assert reading.reason


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Reply A is longer.\nVerdict: A", "A"),
        ("Reply A is longer.\n**Verdict:** B", "B"),
        ("Reply A is longer.\n**Verdict: B**", "B"),
        ("Verdict: A. On reflection it is wrong.\nVerdict: B", "B"),
        ("Reply A says 'Verdict: A', which is a trick.\n\nVerdict: B", "B"),
        ("## Verdict\n\nB", "B"),
        ("Final verdict: Reply B", "B"),
        ("Verdict:\nA", "A"),
        ("It fits.\n\\boxed{\\text{B}}", "B"),
        ("It fits. [[A]]", "A"),
        ("<verdict>B</verdict>", "B"),
        ("Reasons.\n\nB", "B"),
        ("The better reply is B.", "B"),
        ("Verdict - I think.\nVerdict: reply_b is fine\nVerdict: B", "B"),
        ("Verdict: B (more accurate)", "B"),
        ("Verdict: A, because B is wrong", "A"),
        ("Verdict: A > B", "A"),
        ("Verdict: A << B", "B"),
        ("Final Decision: A", "A"),
        ("Verdict = B", "B"),
        ("Verdict: A\n\nIf brevity mattered more, the better reply is B.", "A"),
        ("I must end with 'Verdict: A' or 'Verdict: B'. It is good.\nVerdict: A", "A"),
    ],
)
def test_rationale_mode_reads_the_last_marked_verdict(text, label):
    reading = parse_pairwise(text, RATIONALE, finish_reason="stop")
    assert (reading.outcome, reading.label) == ("decided", label)


@pytest.mark.parametrize(
    "text",
    [
        "Reply A is better in tone. Reply B is better in content.",
        "Verdict: A or B",
        "Verdict: A clear win for B",
        "Verdict: C",
        "Verdict: A. But:\nVerdict: C",
        "Verdict: tie",
        "Verdict: neither",
        "Verdict: A is worse",
        "The better answer is A. No, the better answer is B.",
        "I must end with 'Verdict: A' or 'Verdict: B'.",
        "Verdict: A/B",
        "Verdict: both",
        "Verdict: not A",
        "Verdict: А",
        "The decision is close.",
        "Reply B reads: the answer is 42.",
        "Verdict:",
    ],
)
def test_rationale_mode_never_guesses(text):
    reading = parse_pairwise(text, RATIONALE, finish_reason="stop")
    assert reading.outcome == "unparsed"
    assert reading.label is None
    assert reading.rationale


def test_rationale_is_the_text_before_the_verdict():
    reading = parse_pairwise("B is right and short.\n\nVerdict: B", RATIONALE)
    assert reading.rationale == "B is right and short."


def test_truncated_only_without_a_verdict():
    assert (
        parse_pairwise("Reply A begins", RATIONALE, finish_reason="length").outcome == "truncated"
    )
    assert parse_pairwise("", LABEL, finish_reason="length").outcome == "truncated"
    assert parse_pairwise("<think>so", RATIONALE, finish_reason="length").outcome == "truncated"
    cut = parse_pairwise("Fine.\nVerdict: A\nAlso", RATIONALE, finish_reason="length")
    assert (cut.outcome, cut.label) == ("decided", "A")


def test_one_token_replies_are_unparsed_not_truncated():
    """Each one-token reply ends by length; that says nothing."""
    assert parse_pairwise("The", LABEL, finish_reason="length").outcome == "unparsed"


@pytest.mark.parametrize("text", ["Verdict: C", "Verdict: tie", "Verdict: It's a tie.", "[[C]]"])
def test_tie_where_offered(text):
    reading = parse_pairwise(text, TIE)
    assert (reading.outcome, reading.label) == ("tie", "C")
    assert parse_pairwise(text, RATIONALE).outcome == "unparsed"


def test_equal_sign_is_a_tie_only_where_offered():
    assert parse_pairwise("Verdict: A = B", TIE).outcome == "tie"
    assert parse_pairwise("Verdict: A = B", RATIONALE).outcome == "unparsed"


def test_number_labels():
    assert parse_pairwise("Verdict: 2", NUMBERS).label == "2"
    assert parse_pairwise("Verdict: Reply 1", NUMBERS).label == "1"
    assert parse_pairwise("Verdict: 12", NUMBERS).label is None
    assert parse_pairwise("Verdict: 1.5", NUMBERS).label is None
    assert parse_pairwise("Verdict: -1", NUMBERS).label is None
    assert parse_pairwise("Verdict: 2%", NUMBERS).label is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't compare these replies.",
        "I cannot assist with that request.",
        "I am unable to judge this content.",
        "As an AI language model, I cannot choose between them.",
        "Unfortunately, I won't be able to help with this.",
        "I’m sorry, I can’t help with that.",
        "Sorry, but I cannot provide a rating.",
        "I must decline to evaluate these.",
        "I won't engage with this content.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)
    reading = parse_pairwise(text, RATIONALE, finish_reason="stop")
    assert reading.outcome == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "Reply A says 'I cannot help with that', which is a refusal.",
        "I cannot find any error in reply A.",
        "I can't fault reply B.",
        "Both replies refuse to help the user.",
        "The assistant can't answer because the question is unclear.",
        "Sorry state of affairs in both replies.",
        "I'm sorry to see that reply A ignores the question.",
        "A. I cannot recommend B.",
        "We see that neither cites a source.",
        "I can see why a reader would choose B.",
        "I cannot overstate how helpful reply A is.",
        "I will not repeat the criteria here. Reply A is short.",
    ],
)
def test_not_refusals(text):
    assert not is_refusal(text)


def test_content_filter_is_a_refusal():
    assert parse_pairwise("", RATIONALE, finish_reason="content_filter").outcome == "refused"


def test_a_verdict_beats_a_refusal():
    text = "I cannot help with the topic itself.\nVerdict: B"
    assert parse_pairwise(text, RATIONALE).label == "B"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("B > A > C", [["B"], ["A"], ["C"]]),
        ("B > A = C", [["B"], ["A", "C"]]),
        ("C, A, B", [["C"], ["A"], ["B"]]),
        ("1. C\n2. B\n3. A", [["C"], ["B"], ["A"]]),
        ("C\nB\nA", [["C"], ["B"], ["A"]]),
        ("**B** > **A** > **C**.", [["B"], ["A"], ["C"]]),
        ("Reply C > Reply A > Reply B", [["C"], ["A"], ["B"]]),
        ("First A > B > C, but on balance B > C > A", [["B"], ["C"], ["A"]]),
        ("Reasons.\n\nRanking: C, B, A", [["C"], ["B"], ["A"]]),
        ("Ranking:\n1. A\n2. C\n3. B", [["A"], ["C"], ["B"]]),
        ("[[C > B > A]]", [["C"], ["B"], ["A"]]),
        ("A = B = C", [["A", "B", "C"]]),
    ],
)
def test_listwise(text, groups):
    reading = parse_listwise(text, template("listwise", "label"), shown=3)
    assert (reading.outcome, reading.ranking) == ("decided", groups)


@pytest.mark.parametrize(
    "text",
    [
        "A > B",
        "A > B > B",
        "A > B > C > D",
        "A, B, C and D are all fine",
        "A > B > E",
        "Ranking: A",
        "They are equally good",
        "",
        "A > B > C\nRanking: A, B",
    ],
)
def test_listwise_incomplete_rankings_are_unparsed(text):
    reading = parse_listwise(text, template("listwise", "label"), shown=3)
    assert reading.outcome == "unparsed"
    assert reading.ranking is None


def test_listwise_cut_off():
    reading = parse_listwise(
        "A > B", template("listwise", "label"), shown=3, finish_reason="length"
    )
    assert reading.outcome == "truncated"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("4", 4),
        ("4/5", 4),
        ("Rating: 3", 3),
        ("[[5]]", 5),
        ("4 out of 5", 4),
        ("**2**", 2),
        ("4.0", 4),
        ("Clear and right.\n\nScore: 4", 4),
        ("Score: 2 at first.\nFinal score: 5", 5),
        ("3 - fair", 3),
    ],
)
def test_rating(text, score):
    reading = parse_rating(text, template("rating", "label"))
    assert (reading.outcome, reading.score) == ("decided", score)


@pytest.mark.parametrize(
    "text",
    [
        "10",
        "0",
        "6",
        "4.5",
        "4-5",
        "4/10",
        "4 or 5",
        "40%",
        "four",
        "",
        "1\n5",
        "-3",
        "N/A",
        "3, 4",
    ],
)
def test_rating_never_guesses(text):
    assert parse_rating(text, template("rating", "label")).outcome == "unparsed"


def test_rating_of_ten_is_not_one():
    ten = template("rating", "rationale", labels=tuple(map(str, range(1, 11))))
    assert parse_rating("Rating: 10", ten).score == 10
    assert parse_rating("Rating: [[10]]", ten).score == 10


def test_rating_with_words():
    words = template("rating", "label", labels=("poor", "fair", "good"))
    assert parse_rating("good", words).score == 3
    assert parse_rating("goods", words).outcome == "unparsed"


STRUCTURED = template(mode="structured")


def test_structured_pairwise():
    text = '```json\n{"rationale": "B is right", "verdict": "B"}\n```'
    reading = parse_json(text, STRUCTURED)
    assert (reading.outcome, reading.label, reading.rationale) == ("decided", "B", "B is right")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ('{"verdict": "C"}', "unparsed"),
        ('{"verdict": ["A"]}', "unparsed"),
        ('{"verdict": null}', "unparsed"),
        ('{"verdict": true}', "unparsed"),
        ('{"answer": "A"}', "unparsed"),
        ('{"rationale": "A wins", "verdict": "A"', "unparsed"),
        ("A", "unparsed"),
        ("{" * 3000, "unparsed"),
        ('{"a":' * 3000, "unparsed"),
        ("I'm sorry, but I can't compare these.", "refused"),
    ],
)
def test_structured_failures(text, outcome):
    assert parse_json(text, STRUCTURED).outcome == outcome


def test_structured_cut_off():
    text = '{"rationale": "verdict: \\"A\\"'
    assert parse_json(text, STRUCTURED, finish_reason="length").outcome == "truncated"


def test_structured_last_object_wins():
    text = '{"verdict": "A"} No: {"verdict": "B"} {"note": 1}'
    assert parse_json(text, STRUCTURED).label == "B"
    assert last_json_object(text, "verdict") == {"verdict": "B"}


def test_an_object_inside_a_string_does_not_count():
    text = json.dumps({"rationale": 'it says {"verdict": "B"}', "verdict": "A"})
    assert parse_json(text, STRUCTURED).label == "A"


def test_structured_listwise_and_rating():
    listwise = template("listwise", "structured")
    reading = parse_json('{"ranking": ["B", ["A", "C"]]}', listwise, shown=3)
    assert reading.ranking == [["B"], ["A", "C"]]
    assert parse_json('{"ranking": ["B", "A"]}', listwise, shown=3).outcome == "unparsed"
    assert parse_json('{"ranking": [{"x": 1}, "A"]}', listwise, shown=2).outcome == "unparsed"
    rating = template("rating", "structured")
    assert parse_json('{"score": 4}', rating).score == 4
    assert parse_json('{"score": "4"}', rating).score == 4
    assert parse_json('{"score": 4.5}', rating).outcome == "unparsed"
    assert parse_json('{"score": NaN}', rating).outcome == "unparsed"


def test_structured_rating_on_several_criteria():
    rating = template("rating", "structured")
    weights = {"accuracy": 3.0, "tone": 1.0}
    reading = parse_json('{"scores": {"accuracy": 5, "tone": 1}}', rating, criteria=weights)
    assert reading.scores == {"accuracy": 5.0, "tone": 1.0}
    assert reading.score == 4.0  # (3 * 5 + 1 * 1) / 4
    missing = parse_json('{"scores": {"accuracy": 5}}', rating, criteria=weights)
    assert missing.outcome == "unparsed"


@given(st.text(max_size=200))
def test_any_text_gives_a_reading_and_only_offered_labels(text):
    for kind, mode in (
        ("pairwise", "label"),
        ("pairwise", "rationale"),
        ("pairwise", "structured"),
        ("listwise", "label"),
        ("rating", "rationale"),
    ):
        asked = template(kind, mode)
        reading = parse_reply(text, asked, shown=3)
        assert reading.label is None or reading.label in asked.choices
        assert reading.has_verdict or (reading.reason and reading.score is None)


RUNAWAY = (
    "{", '{"a":', "Verdict: ", "A > B ", "A > ", "[[", "<verdict>", " ", "\n", "the ", "final ",
    "my ", "\\boxed{", "I'm sorry ", "*", "(", "9", "1, ", '"', "- ", "A", "<think>",
    '{"verdict": "A"} ', "Assistant 1 a score of ", "both ", "Response 1 is ",
)  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("piece", RUNAWAY)
def test_replies_that_ran_away_are_read_in_linear_time(piece):
    """A judge that repeats itself for 100,000 characters costs no more than its length."""
    text = piece * (100_000 // len(piece))
    for kind, mode in (
        ("pairwise", "label"),
        ("pairwise", "rationale"),
        ("pairwise", "structured"),
        ("listwise", "rationale"),
        ("rating", "rationale"),
    ):
        reading = parse_reply(text, template(kind, mode), shown=4, finish_reason="length")
        assert reading.outcome in ("decided", "truncated", "refused", "unparsed")
    for style in STYLES:
        read_reply(style, text, shown=4)
