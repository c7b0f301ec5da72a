"""What must not leave is found; what only looks like it is not; reports leak nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.errors import InputError
from feedback.scan import _may_hold_secret, _secret_patterns, find, redact, scan

# Put together at run time, so that no scanner takes this file for a leak.
FOUND = {
    "openai-like key": ("secret", "sk-" + "proj-" + "a1B2c3D4" * 5),
    "hub token": ("secret", "hf_" + "AbCdEfGh" * 4 + "Xy"),
    "aws key": ("secret", "AKIA" + "ABCDEFGH12345678"),
    "github token": ("secret", "ghp_" + "a1B2c3D4e5F6" * 3),
    "private key": ("secret", "BEGIN RSA " + "PRIVATE KEY"),
    "e-mail": ("email", "jane.doe+lists@mail.example.org"),
    "e-mail, other script": ("email", "müller@beispiel.example"),
    "phone": ("phone", "(415) 555-2671"),
    "phone, abroad": ("phone", "+44 20 7946 0958"),
    "iban": ("iban", "DE89 3704 0044 0532 0130 00"),
    "card": ("card", "4111 1111 1111 1111"),
    "home path": ("path", "/home/jane/secret/data.csv"),
    "windows path": ("path", "C:\\Users\\jane\\notes.txt"),
    "url with password": ("endpoint", "https://user:hunter2@db.example.org/x"),
}
CLEAN = [
    "Book a table for 4 at 7:30 pm on March 5th, 2026.",
    "The ratio is 3.14159265358979 and the year was 1984.",
    "Order 1234 5678 9012 3456 is on its way.",  # fails the check digit
    "Use a/b testing and/or either/or; see /help for more.",
    "Reply @someone on the forum, version 2.0.1.",
    "DE00 1234 5678 9012 3456 78 is not an account.",
    "sk-learn is spelled scikit-learn.",
    "Visit https://example.org/path?query=1#top.",
]


@pytest.mark.parametrize("name", FOUND)
def test_found_and_redacted(name: str) -> None:
    kind, secret = FOUND[name]
    text = f"Before {secret} after."
    spans = find(text)
    assert [span.kind for span in spans] == [kind], spans
    cleaned = redact(text, spans)
    assert cleaned.startswith("Before [") and cleaned.endswith("after.")
    assert secret not in cleaned
    assert find(cleaned) == []


@pytest.mark.parametrize("text", CLEAN)
def test_look_alikes_are_left_alone(text: str) -> None:
    assert find(text) == []


def test_report_counts_rows_and_masks_what_it_shows() -> None:
    rows = [
        ("r1", {"prompt": "Write to a@example.org", "chosen": "and b@example.org"}),
        ("r2", {"prompt": "nothing", "chosen": "here"}),
        ("r3", {"prompt": "call (415) 555-2671"}),
    ]
    report = scan(rows)
    assert (report.rows, report.counts["email"], report.rows_with["email"]) == (3, 2, 1)
    assert report.examples["email"][0].row_id == "r1"
    assert "example.org" not in str(report.examples)
    assert report.blocking() == ["email", "phone"]
    assert report.blocking(["email"]) == ["phone"]
    with pytest.raises(InputError, match="did you mean 'email'"):
        report.blocking(["emial"])


def test_overlapping_findings_count_once() -> None:
    text = "https://jane:pw@mail.example.org"
    assert [span.kind for span in find(text)] == ["endpoint"]


@settings(max_examples=100)
@given(st.sampled_from(_secret_patterns()).flatmap(st.from_regex))
def test_no_token_slips_past_the_first_look(text: str) -> None:
    """Whatever a detector's pattern matches is looked at, of this and any later release."""
    assert _may_hold_secret(text)
