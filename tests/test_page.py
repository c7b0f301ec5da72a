"""Pages: escaped, self-contained, legible by machines, and smooth with ten thousand rows."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from test_gate import leave

from feedback.errors import InputError
from feedback.intervals import Estimate, nothing
from feedback.page.browser import PairView, VerdictView, browser
from feedback.page.components import (
    Cell,
    FigureRow,
    Section,
    figure_table,
    headline,
    note,
    number,
    side_by_side,
    table,
)
from feedback.page.curves import read_curves
from feedback.page.plots import curve_plot, histogram_plot, interval_plot
from feedback.page.shell import render_page
from feedback.page.text import conversation, cut, embed_json, visible
from feedback.report import ReportOptions, run
from feedback.simulation import Planted, simulate

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</script><!-- --></textarea>{{ 7*7 }}{% raw %} & \x1b[31mred\x1b[0m \x07 \u202egnp.exe\u202c "
    "\u2066x\u2069 \U000e0041\U000e0042 \u200b \ufeff \x9b2J $\\frac{1}{2}$"
)
HIDDEN = (
    "\x1b",
    "\x07",
    "\x9b",
    "\u202e",
    "\u202c",
    "\u2066",
    "\u2069",
    "\U000e0041",
    "\u200b",
    "\ufeff",
)


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def figure(value: float | None = 0.5) -> FigureRow:
    estimate = (
        nothing() if value is None else Estimate(value, value - 0.1, value + 0.1, 1234, 99, "m")
    )
    return FigureRow(label=HOSTILE, estimate=estimate, meaning=HOSTILE, name=HOSTILE, fair=0.5)


def verdict_view(**more: object) -> VerdictView:
    values = {"verdict_id": "v", "outcome": "decided", "winner": "a", "p": 0.9, "mass": 0.99}
    return VerdictView(**(values | more))  # type: ignore[arg-type]


def pair_view(number: int = 0, text: str = "text", **more: object) -> PairView:
    values = {
        "pair_id": f"p{number}",
        "prompt": f"question {number} {text}",
        "a_name": text,
        "a": f"answer {number} {text}",
        "b_name": text,
        "b": f"other {number} {text}",
        "judge": 0,
        "verdicts": (verdict_view(), verdict_view(p=0.7)),
        "p": 0.8,
    }
    return PairView(**(values | more))  # type: ignore[arg-type]


def hostile_page() -> str:
    views = [pair_view(0, HOSTILE, remark=HOSTILE, gold="b")]
    blocks = [
        headline([figure()]),
        figure_table([figure(), figure(None)], caption=HOSTILE),
        table([HOSTILE], [[HOSTILE], [Cell(HOSTILE)], [0.5], [None], [True]], caption=HOSTILE),
        note(HOSTILE),
        side_by_side(HOSTILE, [(HOSTILE, HOSTILE), (HOSTILE, HOSTILE)], remark=HOSTILE),
        curve_plot({HOSTILE: ([1, 2], [0.1, 0.2])}, name=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        browser(views, [HOSTILE], label=HOSTILE),
    ]
    return render_page(
        title=HOSTILE,
        kicker=HOSTILE,
        subtitle=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
        sections=[Section("one", HOSTILE, HOSTILE, blocks)],
        footer=HOSTILE,
    )


# --- hostile text ----------------------------------------------------------------------------


def test_hostile_text_stays_text() -> None:
    page = hostile_page()
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert "img" not in tags
    assert "textarea" not in tags
    assert all(not name.startswith("on") for _, attrs in reader.tags for name in attrs)
    scripts = [attrs for tag, attrs in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]
    for character in HIDDEN:
        assert character not in page, f"U+{ord(character):04X}"
    assert "\u2039U+202E\u203agnp.exe" in page
    assert "{{ 7*7 }}" in "".join(reader.text)


def test_only_the_known_script_may_run() -> None:
    """The policy names the script by the hash of exactly what stands in the page."""
    page = hostile_page()
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(
        attrs["content"]
        for tag, attrs in Reader(page).tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_embedded_data_cannot_end_its_block() -> None:
    text = embed_json({"x": "</script><script>\u2028 & <!--"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": "</script><script>\u2028 & <!--"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb", "a\nb"),
        ("\x00", "\u2039U+0000\u203a"),
        ("\u2067", "\u2039U+2067\u203a"),
        ("\ud800", "\u2039U+D800\u203a"),
        ("Zo\u00eb \u4f60\u597d \u0633\u0644\u0627\u0645 \U0001f468\u200d\U0001f469", None),
    ],
)
def test_visible(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)
    visible(text).encode("utf-8")


# --- the page as a whole ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a written report card."""
    folder = tmp_path_factory.mktemp("card")
    planted = Planted(position=0.5, length=0.5, soft=True, votes=3, unparsed=0.05, tie=-1.5)
    run(ReportOptions(verdicts=leave(simulate(planted, prompts=80), folder), replicates=200))
    return folder / "report-card"


def test_a_card_loads_nothing_from_anywhere(card: Path) -> None:
    page = (card / "report.html").read_text(encoding="utf-8")
    reader = Reader(page)
    for tag, attrs in reader.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    css = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert all("url(" not in text and "@import" not in text for text in css)
    assert re.findall(r"url\((?!#)", page) == []
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_a_card_is_well_formed_and_every_id_is_unique(card: Path) -> None:
    page = (card / "report.html").read_text(encoding="utf-8")
    reader = Reader(page)
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    assert anchors
    assert all(anchor is not None and anchor[1:] in ids for anchor in anchors)
    used = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page)
    assert all((left or right) in ids for left, right in used)
    for mark in ("#010101", "#110001", "#020202"):
        assert mark not in page


def test_every_figure_has_n_interval_and_meaning(card: Path) -> None:
    data = json.loads((card / "report.json").read_text())
    page = " ".join((card / "report.html").read_text(encoding="utf-8").split())
    for section in data["arms"][0]["sections"]:
        for row in section["figures"]:
            assert row["meaning"].replace("'", "&#39;").replace(">", "&gt;") in page, row["name"]
            assert f"<code>{row['name']}</code>" in page


def test_viewer_file_has_every_required_field(card: Path) -> None:
    data = json.loads((card / "llm-comparator.json").read_text())
    assert set(data) == {"metadata", "models", "examples"}
    assert len(data["models"]) == 2
    fields = {entry["name"] for entry in data["metadata"]["custom_fields_schema"]}
    for example in data["examples"]:
        assert {"input_text", "tags", "output_text_a", "output_text_b", "score",
                "individual_rater_scores", "custom_fields"} <= set(example)  # fmt: skip
        assert set(example["custom_fields"]) == fields
        for rating in example["individual_rater_scores"]:
            assert -1.5 <= rating["score"] <= 1.5
            assert {"is_flipped", "rationale", "rating_label"} <= set(rating)


def test_viewer_scores_follow_the_models() -> None:
    """A is the first model by name, whichever completion id sorts first."""
    from feedback.page.comparator import comparator_json

    simulated = simulate(Planted(soft=True), prompts=6)
    pairs = simulated.pairs()
    data = comparator_json([pairs], simulated.material)
    assert data is not None
    names = [entry["name"] for entry in data["models"]]
    known = {text.completion: text.model for side in simulated.material.prompts.values()
             for text in side.completions.values()}  # fmt: skip
    for example in data["examples"]:
        assert known[example["output_text_a"]] == names[0] or len(set(names)) == 1
        prompt = example["custom_fields"]["prompt_id"]
        row = next(
            row
            for row in range(len(pairs))
            if pairs.prompt_ids[pairs.prompt[row]] == prompt
            and {side.completion for side in pairs.completions[row]}
            == {example["output_text_a"], example["output_text_b"]}
        )
        a_is_a = pairs.completions[row][0].completion == example["output_text_a"]
        p = pairs.mean_p[row] if a_is_a else 1 - pairs.mean_p[row]
        assert example["score"] == pytest.approx((2 * p - 1) * 1.5)


# --- Chromium --------------------------------------------------------------------------------


def chromium(page: Path, profile: Path, *options: str) -> str:
    """Return what headless Chromium prints for a page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs the program chromium")
    done = subprocess.run(
        [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=8000",
            "--window-size=1100,900", *options, page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


def test_ten_thousand_rows_draw_only_what_is_seen(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    views = [
        pair_view(number, "word " * 40, p=float(p), verdicts=(verdict_view(p=float(p)), None))
        for number, p in enumerate(random.random(10_000))
    ]
    started = time.monotonic()
    page = render_page(title="t", sections=[Section("v", "v", "", [browser(views, ["j"])])])
    assert time.monotonic() - started < 60
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    drawn = chromium(path, tmp_path / "profile", "--dump-dom")
    rows = re.findall(r'<button class="row"[^>]*data-place="(\d+)"', drawn)
    assert 10 <= len(rows) <= 60
    assert rows[0] == "0"
    assert "10,000 of 10,000 pairs" in drawn
    height = re.search(r'class="space" style="height: (\d+)px', drawn)
    assert height is not None
    assert int(height[1]) >= 10_000 * 40


def test_hostile_rows_run_nothing_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(hostile_page(), encoding="utf-8")
    drawn = chromium(path, tmp_path / "profile", "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", drawn, re.DOTALL)
    assert title is not None
    assert title[1] != "owned"
    assert 'class="row"' in drawn  # the page's own script did run
    assert "<img" not in drawn


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "states"),
    [
        (pair_view(), ["consistent"]),
        (pair_view(verdicts=(verdict_view(), verdict_view(winner="b"))), ["conflict"]),
        (pair_view(verdicts=(verdict_view(), None)), ["one-order"]),
        (
            pair_view(verdicts=(verdict_view(outcome="tie", winner=None), verdict_view())),
            ["conflict", "tie"],
        ),
        (
            pair_view(verdicts=(verdict_view(outcome="refused", winner=None), None)),
            ["one-order", "problem"],
        ),
        (pair_view(gold="b"), ["consistent", "wrong"]),
    ],
)
def test_filters_of_the_table(view: PairView, states: list[str]) -> None:
    assert view.states == states


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (None, True, "\u2013"),
        (0.5, True, "50.0%"),
        (1.0, False, "1.000"),
        (-0.25, False, "\u22120.250"),
        (1234.5, False, "1,234.5"),
    ],
)
def test_numbers(value: float | None, percent: bool, text: str) -> None:
    assert number(value, percent=percent) == text


def test_texts_are_cut_with_a_note() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcdef", 3) == "abc \u2026 [3 more characters]"


def test_conversations() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert conversation(turns) == "user: q\nassistant: r"  # type: ignore[arg-type]
    assert conversation("q") == conversation(turns[:1]) == "q"  # type: ignore[arg-type]


def test_plots_are_markup_with_the_pages_colours() -> None:
    for made in (
        curve_plot(
            {"loss": (range(100), np.linspace(1, 0, 100))}, name="a", x_label="s", y_label="l"
        ),
        histogram_plot({"x": [0.1, 0.2], "y": [0.3]}, name="b", x_label="p"),
        interval_plot([("row", 0.5, 0.4, 0.6), ("none", 0.5, None, None)], name="c", x_label="v"),
    ):
        assert isinstance(made, Markup)
        assert "var(--series-1)" in made
        assert made.startswith("<svg viewBox=")
        assert 'role="img"' in made


def test_curves_of_each_kind_of_log(tmp_path: Path) -> None:
    (tmp_path / "loss.jsonl").write_text(
        '{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6, "x": "y"}\n'
    )
    assert read_curves(tmp_path) == {"loss": ([1.0, 2.0], [0.7, 0.6])}
    (tmp_path / "loss.jsonl").unlink()
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    state = {"log_history": [{"step": 2, "epoch": 0.1, "loss": 0.5}, {"train_runtime": 3.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert read_curves(tmp_path) == {"loss": ([2.0], [0.5])}
    (tmp_path / "metrics.jsonl").write_text("{oops")
    with pytest.raises(InputError, match=r"metrics\.jsonl:1"):
        read_curves(tmp_path)
