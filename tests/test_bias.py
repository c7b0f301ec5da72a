"""Length, format and self-preference by hand."""

from __future__ import annotations

import numpy as np
import pytest
from judged import with_texts

from feedback.bias import format_section, length_section, model_columns, prefer_longer
from feedback.figures import CardSection
from feedback.intervals import Resampler
from feedback.selfpreference import model_family, self_preference_section
from feedback.style import read_style

LONG = "word " * 20
SHORT = "word"


def by_name(section: CardSection) -> dict[str, float | None]:
    return {figure.name.split(".")[1]: figure.estimate.value for figure in section.figures}


def test_prefer_longer_by_hand() -> None:
    """x is longer by more than 30 characters in four of five pairs, and wins two of three."""
    pairs = with_texts(
        [
            (LONG, SHORT, "12", None),
            (LONG, SHORT, "12", None),
            (LONG, SHORT, "21", None),
            (LONG, SHORT, "11", None),  # level over both orders: left out
            (SHORT + "x" * 30, SHORT, "12", None),  # 30 characters apart: not more than 30
        ]
    )
    estimate = prefer_longer(pairs)
    assert estimate.value == pytest.approx(2 / 3)
    assert estimate.n == 3


def test_excess_over_gold_by_hand() -> None:
    """The judge takes the longer in 4 of 4, gold in 2 of 4: excess one half."""
    pairs = with_texts([(LONG, SHORT, "12", label) for label in ("a", "a", "b", "b")])
    section = length_section(pairs, Resampler(np.arange(4)))
    found = by_name(section)
    assert found["prefer_longer"] == 1.0
    assert found["gold_prefers_longer"] == 0.5
    assert found["excess"] == pytest.approx(0.5)
    assert found["accuracy_longer_is_worse"] == 0.0


def test_without_texts_nothing_is_claimed() -> None:
    from judged import pairs_of

    section = length_section(pairs_of("12"), Resampler(np.arange(1)))
    assert section.figures == []
    assert "--candidates" in section.notes[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- one\n- two\n3. three", {"list": 3}),
        ("* not**bold** here", {"list": 1, "bold": 1}),
        ("# Head\n## Two\n#no", {"header": 2}),
        ("**a** and __b__ and ** not **\n", {"bold": 3}),
        ("```\n- not a list\n# nor a header\n```", {"code": 1}),
        ("use `x - y` and\n```py\nopen", {"code": 2}),
        ("5 - 3 = 2, -1 is less", {}),
    ],
)
def test_style_counts(text: str, expected: dict[str, int]) -> None:
    style = read_style(text)
    for name in ("list", "header", "bold", "code"):
        assert getattr(style, name) == expected.get(name, 0), name


def test_prefer_list_counts_only_pairs_with_one_list() -> None:
    listed = "Here:\n- one\n- two"
    pairs = with_texts(
        [
            (listed, "plain text", "12", None),
            ("plain text", listed, "12", None),
            (listed, listed + "!", "12", None),
            (listed, "plain text", "12", None),
        ]
    )
    section = format_section(pairs)
    figures = {figure.name: figure.estimate for figure in section.figures}
    assert figures["format_bias.prefer_list"].value == pytest.approx(2 / 3)
    assert figures["format_bias.prefer_list"].n == 3
    assert "header, bold, code" in section.notes[0]


def test_model_columns_are_bradley_terry() -> None:
    pairs = with_texts([("a", "b", "12", None)], models=("one", "two"))
    (column,) = model_columns(pairs)
    assert abs(column[0]) == 1.0
    assert model_columns(with_texts([("a", "b", "12", None)])) == []


def test_self_preference_by_hand() -> None:
    """Own answer x. Gold prefers x in two pairs (found in both), y in two (found in one)."""
    pairs = with_texts(
        [
            ("t", "u", "12", "a"),
            ("t", "u", "12", "a"),
            ("t", "u", "12", "b"),
            ("t", "u", "21", "b"),
        ],
        models=("judge-large", "other"),
    )
    section = self_preference_section(pairs, Resampler(np.arange(4)))
    found = by_name(section)
    assert found["own_wins"] == pytest.approx(3 / 4)
    assert found["recall_own"] == 1.0
    assert found["recall_other"] == 0.5
    assert found["equal_opportunity"] == pytest.approx(0.5)


def test_self_preference_needs_an_own_answer() -> None:
    pairs = with_texts([("t", "u", "12", "a")], models=("some", "other"))
    section = self_preference_section(pairs, Resampler(np.arange(1)))
    assert section.figures == []
    assert "nothing to fear" in section.notes[0]
    named = self_preference_section(pairs, Resampler(np.arange(1)), own_models=("some",))
    assert by_name(named)["own_wins"] == 1.0


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("openai/gpt-4o-mini", "gpt"),
        ("o3-mini", "gpt"),
        ("claude-2.1", "claude"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
        ("vicuna-13b", "llama"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
        ("pocket:judge", "pocket"),
        ("acme/roadrunner-7b", "roadrunner"),
    ],
)
def test_model_families(model: str, family: str) -> None:
    assert model_family(model) == family
