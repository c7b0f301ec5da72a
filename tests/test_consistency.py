"""Cycles, repeats, entropy and label schemes by hand."""

from __future__ import annotations

import numpy as np
import pytest
from judged import verdict

from feedback.consistency import entropy, repeat_agreement, scheme_section, transitivity
from feedback.intervals import Resampler
from feedback.observations import Pairs, collect
from feedback.records import Verdict


def triple(prompt: str, *winners: str) -> list[Verdict]:
    """Return both orders of xy, yz, zx with the named winners; "?": the first place wins."""
    rows = []
    for (one, two), winner in zip(("xy", "yz", "zx"), winners, strict=True):
        for shown in ((one, two), (two, one)):
            said = "1" if winner in (shown[0], "?") else "2"
            rows.append(verdict(prompt, shown, said))
    return rows


def test_cycles_by_hand() -> None:
    rows = triple("p0", "x", "y", "z") + triple("p1", "x", "y", "x") + triple("p2", "x", "y", "?")
    strict, half = transitivity(collect(rows)[0])
    assert (strict.value, strict.n) == (pytest.approx(1 / 2), 2)
    # The third triple is a cycle with chance one half.
    assert (half.value, half.n) == (pytest.approx((1 + 0 + 0.5) / 3), 3)


def test_pairs_without_a_third_are_no_triple() -> None:
    strict, _ = transitivity(collect([verdict("p", ("x", "y"), "1")])[0])
    assert strict.value is None


def repeated(*words: str) -> Pairs:
    rows = [
        verdict(f"p{number}", ("x", "y"), said, repeat=repeat)
        for number, word in enumerate(words)
        for repeat, said in enumerate(word)
    ]
    return collect(rows)[0]


def test_repeats_by_hand() -> None:
    """1112: three of six couples agree; 11: one of one; a single answer says nothing."""
    estimate = repeat_agreement(repeated("1112", "11", "1"))
    assert estimate.value == pytest.approx((3 / 6 + 1) / 2)
    assert estimate.n == 2


def test_entropy_by_hand() -> None:
    """Verdicts 1, 1, 2, T: shares 1/2, 1/4, 1/4 make 1.5 bits; 1, 1 makes none."""
    bits = entropy(repeated("112T", "11", "1"))
    assert sorted(bits.values()) == [0.0, 1.5]


def test_schemes_by_hand() -> None:
    """Three of four questions end the same under the other template."""
    rows = []
    for template, words in (("letters", ("12", "12")), ("numbers", ("12", "11"))):
        for number, word in enumerate(words):
            for said, shown in zip(word, (("x", "y"), ("y", "x")), strict=True):
                p = 0.9 if said == "1" else 0.1
                rows.append(verdict(f"p{number}", shown, said, p_first=p, template=template))
    section = scheme_section(collect(rows), Resampler(np.arange(2)))
    assert section is not None
    values = {figure.name.split(":")[0]: figure.estimate.value for figure in section.figures}
    assert values["scheme.flips"] == pytest.approx(1 / 4)
    assert values["scheme.change"] == pytest.approx(0.8 / 4)
    # The changed verdict went from the second place to the first.
    assert values["scheme.first_label"] == pytest.approx(0.8 / 4)


def test_one_template_has_no_scheme() -> None:
    assert scheme_section(collect([verdict("p", ("x", "y"), "1")]), Resampler(np.arange(1))) is None
