"""The gold check: hand-written replies, then every reply that the booking generator can write."""

from __future__ import annotations

import random
from typing import Any

import pytest

from feedback.goldcheck import gold_check, gold_score
from recipes.pocket_model.bookings import BOOKING_FLAWS, flawed_reply, good_reply, make_booking
from recipes.pocket_model.prompts import prompt_of

OPEN: dict[str, Any] = {
    "given": {"restaurant": "Villa Romana", "count": "4", "time": "7:30 pm"},
    "missing": ["city", "date"],
}
FULL: dict[str, Any] = {
    "given": {"origin": "Boston", "destination": "Denver", "date": "May 9th", "count": "2"},
    "missing": [],
}


@pytest.mark.parametrize(
    "reply",
    [
        "Which city are you in?",
        "Sure. For what date?",
        "A table for four at Villa Romana at 7:30 pm. What day should it be?",
        "Where should I look, and when?",
        "Okay, 4 people at villa romana at 7:30 in the evening. In which city?",
    ],
)
def test_asking_for_what_is_missing_scores_one(reply: str) -> None:
    assert gold_score(OPEN, reply, ended=True) == 1.0


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        # What was asked is known already.
        ("What time would you like?", 0.0),
        # One question is needed, one is not.
        ("For what time? And in which city?", 0.5),
        # Nothing is asked: half of the share of given values that is confirmed (one of three).
        ("You want to eat at Villa Romana.", 0.5 / 3),
        ("Your table has been reserved.", 0.0),
        ("Cats sleep most of the day.", 0.0),
        # One invented city, one wrong time, both.
        ("A table at Villa Romana in Boston. For what date?", 0.5),
        ("At 7:30 am for 4. For what date?", 0.5),
        ("A table in Boston at 8 pm. For what date?", 0.25),
        # "5" where four were given; "Which one" is no number.
        ("A table for 5. Which city?", 0.5),
        ("Which city is it, the one by the sea?", 1.0),
        ("", 0.0),
    ],
)
def test_scores_while_details_are_missing(reply: str, score: float) -> None:
    assert gold_score(OPEN, reply, ended=True) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Please confirm: a flight from Boston to Denver on May 9th for 2.", 1.0),
        ("A flight from Boston to Denver on May 9 for two people. Is that correct?", 1.0),
        # Three of four given values.
        ("A flight from Boston to Denver on May 9th. Shall I go ahead?", 0.75),
        # Three of four confirmed, and one wrong date.
        ("A flight from Boston to Denver on May 10th for 2.", 0.75 * 0.5),
        # The right cities, the wrong way round: two wrong ways.
        ("A flight from Denver to Boston on May 9th for 2.", 0.25),
        # All is known; asking again takes half.
        ("A flight from Boston to Denver on May 9th for 2. How many tickets?", 0.5),
        ("What date would you like?", 0.0),
    ],
)
def test_scores_when_everything_is_given(reply: str, score: float) -> None:
    assert gold_score(FULL, reply, ended=True) == pytest.approx(score)


def test_form_counts() -> None:
    """Each fault of form halves the score: no end, no closing mark, length, repetition."""
    reply = "Which city are you in?"
    assert gold_check(OPEN, reply, ended=False).ending == 0.5
    assert gold_check(OPEN, "Which city are you in", ended=True).ending == 0.5
    assert gold_check(OPEN, "When?", ended=True).length == 0.5
    assert gold_check(OPEN, "Well, " + "then " * 45 + reply, ended=True).length == 0.5
    assert gold_check(OPEN, f"{reply} {reply}", ended=True).repetition == 0.5
    assert gold_check(OPEN, "Which city city are you in?", ended=True).repetition == 0.5
    assert gold_check(OPEN, f"Sure. {reply}", ended=True).score == 1.0


def test_options_are_values_unless_they_are_offered() -> None:
    ride: dict[str, Any] = {"given": {"count": "2"}, "missing": ["place", "ride"]}
    assert gold_check(ride, "A ride for 2 in a luxury cab. Where to?", ended=True).invented == (
        "luxury",
    )
    offered = "Would you like a shared, regular or luxury ride?"
    assert gold_check(ride, offered, ended=True).invented == ()
    assert gold_check(ride, "Do you want a shared ride?", ended=True).invented == ()
    cabin: dict[str, Any] = {"given": {"cabin": "economy"}, "missing": ["date"]}
    dear = gold_check(cabin, "A flight in premium economy. For what date?", ended=True)
    assert dear.invented == ("premium",)


def test_dates_and_times_match_in_any_wording() -> None:
    """What leaves something open agrees with what was given; what contradicts it does not."""
    meta: dict[str, Any] = {"given": {"date": "next Friday", "time": "9 am"}, "missing": ["city"]}
    for reply in ("Friday at 9 in the morning. Which city?", "Next friday, 9:00. Which city?"):
        assert gold_check(meta, reply, ended=True).invented == ()
    for wrong in ("this Friday", "Saturday", "May 9th", "9 pm", "9:15", "tomorrow"):
        assert gold_check(meta, f"For {wrong}. Which city?", ended=True).invented, wrong


def test_every_constructed_reply_is_ranked_rightly() -> None:
    """Good replies of the generator score 1; a flawed one scores less in all but rare cases."""
    rng = random.Random(3)
    lower, total = 0, 0
    for _ in range(400):
        booking = make_booking(rng, held_out=True)
        meta = prompt_of(booking).meta
        assert gold_score(meta, good_reply(booking, rng), ended=True) == 1.0
        for flaw in BOOKING_FLAWS:
            reply = flawed_reply(booking, flaw, rng)
            if reply is not None:
                total += 1
                lower += gold_score(meta, reply, ended=True) < 1.0
    assert total > 1500
    assert lower / total > 0.99


def test_meta_without_slots_is_an_error() -> None:
    with pytest.raises(KeyError, match="given"):
        gold_check({}, "Hello.", ended=True)
