"""People's labels: what is sampled, kept and told to the browser, and what becomes gold."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from chromium import Browser, chromium_program
from test_gate import leave
from test_page import HIDDEN, HOSTILE

from feedback.annotate import AnnotateOptions
from feedback.annotate_log import LABELS, AnnotationLog, Entry
from feedback.annotate_sample import Item, quotas, sample_items
from feedback.annotate_server import Sitting, application
from feedback.calibrate import CalibrateOptions, calibrate
from feedback.card import ReportCard
from feedback.errors import InputError, RecipeError, ShardError
from feedback.observations import load_gold
from feedback.records import Candidates, Completion, Verdict
from feedback.report_run import card_of_folder
from feedback.shards import ShardWriter, read_manifest, read_rows
from feedback.simulation import Planted, simulate

PLANTED = Planted(position=0.4, noise=0.8, soft=True)


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    return leave(simulate(PLANTED, prompts=40), tmp_path, gold=False)


def items(count: int = 4) -> list[Item]:
    return [
        Item(key=(f"p{n}", "x", "y"), prompt=f"q{n}", a=f"text x{n}", b=f"text y{n}", stratum="s")
        for n in range(count)
    ]


def entry(name: str, item: Item, label: str) -> Entry:
    prompt_id, a, b = item.key
    return Entry(
        time="2026-01-01T00:00:00+00:00", annotator=name, prompt_id=prompt_id, a=a, b=b,
        label=label, left="a",  # type: ignore[arg-type]
    )  # fmt: skip


# --- the sample ------------------------------------------------------------------------------


def test_the_sample_is_seeded_shuffled_and_as_mixed_as_the_whole(verdicts: Path) -> None:
    def drawn(**more: Any) -> list[Item]:
        return sample_items(AnnotateOptions(verdicts=verdicts, **({"sample": 40} | more)))

    every = drawn(sample=10_000)
    assert len(every) == len({item.key for item in every}) == 119  # two texts are equal
    assert [item.key for item in every] != sorted(item.key for item in every)
    some = drawn()
    assert some == drawn()
    assert {item.key for item in some} != {item.key for item in drawn(seed=1)}
    assert len({item.key for item in some} & {item.key for item in drawn(sample=80)}) >= 38
    whole, part = (Counter(item.stratum for item in rows) for rows in (every, some))
    assert len(whole) == 4
    assert all(abs(part[name] - count / 3) < 1 for name, count in whole.items())
    assert all(item.weight == pytest.approx(1, abs=0.1) for item in some)


def test_equal_strata_carry_the_weight_that_undoes_them(verdicts: Path) -> None:
    options = AnnotateOptions(
        verdicts=verdicts, sample=20, allocation="equal", strata=("disagreement",)
    )
    drawn = sample_items(options)
    every = sample_items(AnnotateOptions(verdicts=verdicts, sample=999, strata=("disagreement",)))
    counts = Counter(item.stratum for item in drawn)
    assert counts == {"one voice": 10, "divided": 10}
    for name, count in Counter(item.stratum for item in every).items():
        weight = next(item.weight for item in drawn if item.stratum == name)
        assert weight == pytest.approx((count / 119) / (10 / 20), abs=1e-3)


def test_strata_by_meta_field_and_without_verdicts(verdicts: Path) -> None:
    candidates = verdicts.parent / "candidates"
    drawn = sample_items(AnnotateOptions(candidates=candidates, strata=("topic",), sample=20))
    assert Counter(item.stratum for item in drawn) == {f"topic topic {n}": 5 for n in range(4)}
    both = sample_items(AnnotateOptions(verdicts=verdicts, strata=("topic", "disagreement")))
    assert any(re.fullmatch(r"topic topic \d, divided", item.stratum) for item in both)
    with pytest.raises(InputError, match=r"'topics'; did you mean 'topic'\?"):
        sample_items(AnnotateOptions(verdicts=verdicts, strata=("topics",)))
    with pytest.raises(InputError, match="strata by confidence need --verdicts"):
        sample_items(AnnotateOptions(candidates=candidates, strata=("confidence",)))
    with pytest.raises(RecipeError, match="needs --verdicts or --candidates"):
        sample_items(AnnotateOptions())


def test_pairs_with_equal_texts_are_not_asked(tmp_path: Path) -> None:
    texts = {"one": "Yes.", "two": " yes. ", "three": "No."}
    row = Candidates(
        prompt_id="p",
        prompt="q",
        completions=[
            Completion(completion_id=name, completion=text, model="m")
            for name, text in texts.items()
        ],
    )
    with ShardWriter[Candidates](tmp_path / "candidates", "candidates") as writer:
        writer.append(row)
        writer.finish({})
    drawn = sample_items(AnnotateOptions(candidates=tmp_path / "candidates"))
    assert {item.key[1:] for item in drawn} == {("one", "three"), ("three", "two")}


@pytest.mark.parametrize(
    ("sizes", "sample", "equal", "wanted"),
    [
        ({"x": 90, "y": 10}, 10, False, {"x": 9, "y": 1}),
        ({"x": 2, "y": 1}, 2, False, {"x": 1, "y": 1}),
        ({"x": 90, "y": 10}, 40, True, {"x": 30, "y": 10}),
        ({"x": 9, "y": 9, "z": 1}, 10, True, {"x": 5, "y": 4, "z": 1}),
        ({"x": 3}, 10, False, {"x": 3}),
    ],
)
def test_quotas_by_hand(
    sizes: dict[str, int], sample: int, equal: bool, wanted: dict[str, int]
) -> None:
    assert quotas(sizes, sample, equal=equal) == wanted


# --- the journal -----------------------------------------------------------------------------


def test_votes_of_several_people_become_gold(tmp_path: Path) -> None:
    pairs = items()
    log = AnnotationLog(tmp_path, pairs)
    said = {"Ada": "aat", "Bo": "abs", "Cy": "bb"}
    words = {"a": "a", "b": "b", "t": "tie", "s": "skip"}
    for name, labels in said.items():
        for item, label in zip(pairs, labels, strict=False):
            log.append(entry(name, item, words[label]))
    log.close()
    rows = {key[0]: row for key, row in load_gold(tmp_path).items()}
    assert [rows[f"p{n}"].label for n in range(3)] == ["a", "b", "tie"]
    assert rows["p0"].votes == ["a", "a", "b"]
    assert rows["p0"].annotators == ["Ada", "Bo", "Cy"]
    assert rows["p0"].gap == pytest.approx(1 / 3)
    assert rows["p2"].votes == ["tie"] and rows["p2"].gap is None
    assert rows["p0"].meta == {"stratum": "s", "weight": 1.0}
    manifest = read_manifest(tmp_path)
    assert manifest["counts"] == {"a": 1, "b": 1, "tie": 1}
    assert manifest["annotators"]["Bo"] == {
        "labels": 2, "ties": 0, "skips": 1, "left_chosen": 0.5,
    }  # fmt: skip


def test_undo_takes_back_one_answer_after_the_other(tmp_path: Path) -> None:
    pairs = items()
    log = AnnotationLog(tmp_path, pairs)
    for item in pairs[:2]:
        log.append(entry("Ada", item, "a"))
    for _ in range(2):
        last = log.last("Ada")
        assert last is not None
        log.append(entry("Ada", pairs[int(last.prompt_id[1])], "undo"))
        log.close()
        log = AnnotationLog(tmp_path, pairs)
    assert log.last("Ada") is None and not log.gold()
    log.close()
    assert len((tmp_path / LABELS).read_text().splitlines()) == 4  # nothing is ever rewritten


def test_a_torn_line_is_cut_off_and_a_damaged_one_named(tmp_path: Path) -> None:
    pairs = items()
    log = AnnotationLog(tmp_path, pairs)
    for item in pairs[:2]:
        log.append(entry("Ada", item, "a"))
    log.close()
    whole = (tmp_path / LABELS).read_bytes()
    for torn in (b'{"time"', b'{"time":"2026"}'):
        (tmp_path / LABELS).write_bytes(whole + torn)
        log = AnnotationLog(tmp_path, pairs)
        assert len(log.answers("Ada")) == 2
        log.append(entry("Ada", pairs[2], "b"))
        log.close()
        assert (tmp_path / LABELS).read_bytes().startswith(whole)
    (tmp_path / LABELS).write_bytes(whole + b"{}\n" + whole)
    with pytest.raises(InputError, match=r"labels\.jsonl:3: not a label"):
        AnnotationLog(tmp_path, pairs)
    (tmp_path / LABELS).write_bytes(whole)
    AnnotationLog(tmp_path, pairs).close()  # the lock was released


def test_a_full_disk_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = items()
    log = AnnotationLog(tmp_path, pairs)
    log.append(entry("Ada", pairs[0], "a"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ShardError, match="No space left on device"):
            log.append(entry("Ada", pairs[1], "b"))
    assert len((tmp_path / LABELS).read_text().splitlines()) == len(log.gold()) == 1
    log.append(entry("Ada", pairs[1], "tie"))
    log.close()
    assert [row.label for row in load_gold(tmp_path).values()] == ["a", "tie"]


def test_gold_from_elsewhere_is_never_overwritten(tmp_path: Path) -> None:
    verdicts = leave(simulate(PLANTED, prompts=3), tmp_path)
    before = (tmp_path / "gold" / "gold-00000.jsonl").read_bytes()
    with pytest.raises(ShardError, match="not labelled here; choose another folder with --out"):
        AnnotationLog(AnnotateOptions(verdicts=verdicts).folder, items())
    assert (tmp_path / "gold" / "gold-00000.jsonl").read_bytes() == before


def test_one_process_writes_a_folder(tmp_path: Path) -> None:
    log = AnnotationLog(tmp_path, items())
    with pytest.raises(ShardError, match="another run is writing this folder"):
        AnnotationLog(tmp_path, items())
    log.close()


# --- the server ------------------------------------------------------------------------------


def talk(sitting: Sitting, *requests: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Post requests to the real application; return status and body of each."""

    async def run() -> list[dict[str, Any]]:
        async with TestClient(TestServer(application(sitting, key="k"))) as client:
            found = []
            for path, body in requests:
                reply = await client.post(path, json=body)
                text = await reply.text()
                try:
                    content = json.loads(text)
                except ValueError:
                    content = {"text": text}
                found.append({"status": reply.status, "headers": dict(reply.headers), **content})
            return found

    return asyncio.run(run())


@contextmanager
def sitting_of(
    folder: Path, pairs: list[Item] | None = None, **more: Any
) -> Iterator[tuple[Sitting, AnnotationLog]]:
    log = AnnotationLog(folder, pairs or items())
    try:
        yield Sitting(pairs or items(), log, **more), log
    finally:
        log.close()


def test_the_browser_is_told_nothing_but_the_texts(verdicts: Path, tmp_path: Path) -> None:
    drawn = sample_items(AnnotateOptions(verdicts=verdicts))
    with sitting_of(tmp_path / "gold", drawn) as (sitting, _):
        (found,) = talk(sitting, ("/k/next", {"name": "Ada"}))
    assert set(found) - {"status", "headers"} == {
        "pair", "prompt", "left", "right", "done", "total", "undo",
    }  # fmt: skip
    told = json.dumps({key: value for key, value in found.items() if key != "headers"})
    row = next(read_rows(verdicts, Verdict))
    for secret in ("own-policy", "other1", "confidence", *row.shown, row.judge.model, "prompt-0"):
        assert secret not in told


def test_sides_are_drawn_and_labels_follow_them(tmp_path: Path) -> None:
    pairs = items(40)
    with sitting_of(tmp_path, pairs) as (sitting, log):
        lefts = []
        for _ in pairs:
            (shown,) = talk(sitting, ("/k/next", {"name": "Ada"}))
            lefts.append(shown["left"][5])
            talk(sitting, ("/k/answer", {"name": "Ada", "pair": shown["pair"], "answer": "left"}))
        assert 10 <= Counter(lefts)["x"] <= 30
        gold = {row.prompt_id: row for row in log.gold()}
        assert [gold[f"p{n}"].label for n in range(40)] == [
            "a" if left == "x" else "b" for left in lefts
        ]
        assert log.summary("Ada")["left_chosen"] == 1.0
        (end,) = talk(sitting, ("/k/next", {"name": "Ada"}))
        assert end["finished"] and end["done"] == end["total"] == 40


def test_an_answer_given_twice_counts_once_and_undo_shows_the_pair_again(tmp_path: Path) -> None:
    with sitting_of(tmp_path) as (sitting, log):
        (first,) = talk(sitting, ("/k/next", {"name": "Ada"}))
        answer = {"name": "Ada", "pair": first["pair"], "answer": "tie"}
        one, two = talk(sitting, ("/k/answer", answer), ("/k/answer", answer))
        assert one["pair"] == two["pair"] != first["pair"]
        assert len((tmp_path / LABELS).read_text().splitlines()) == 1
        (back,) = talk(sitting, ("/k/undo", {"name": "Ada"}))
        assert back["pair"] == first["pair"] and back["done"] == 0
        assert not log.gold()


def test_votes_share_the_work_out(tmp_path: Path) -> None:
    with sitting_of(tmp_path, votes=1) as (sitting, _):
        for name in ("Ada", "Bo", "Ada", "Bo"):
            (shown,) = talk(sitting, ("/k/next", {"name": name}))
            talk(sitting, ("/k/answer", {"name": name, "pair": shown["pair"], "answer": "left"}))
        ends = talk(sitting, *[("/k/next", {"name": name}) for name in ("Ada", "Bo", "Cy")])
        assert [end["finished"] for end in ends] == [True] * 3
        assert [end["total"] for end in ends] == [2, 2, 0]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/k/next", {"name": "  "}, 400, "a name of 1 to 60"),
        ("/k/next", {"name": "x" * 61}, 400, "a name of 1 to 60"),
        ("/k/next", {"name": "Ada\u202e"}, 400, "cannot be seen"),
        ("/k/next", {"name": 3}, 400, "Expected `str`"),
        ("/k/answer", {"name": "Ada", "pair": "nosuch", "answer": "left"}, 400, "not part of"),
        ("/k/answer", {"name": "Ada", "pair": "nosuch", "answer": "best"}, 400, "Invalid enum"),
        ("/k/next", {"name": "Ada", "more": 1}, 400, "unknown field"),
        ("/other/next", {"name": "Ada"}, 404, ""),
        ("/next", {"name": "Ada"}, 404, ""),
        ("/k/next", {"name": "x" * 70_000}, 413, ""),
    ],
)
def test_bad_requests_are_refused(
    tmp_path: Path, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    with sitting_of(tmp_path) as (sitting, log):
        (found,) = talk(sitting, (path, body))
        assert found["status"] == status
        assert words in found.get("error", "")
        assert "default-src 'none'" in found["headers"]["Content-Security-Policy"]
        assert not log.gold()


def test_a_form_of_another_page_cannot_post(tmp_path: Path) -> None:
    """Only JSON is taken, which a foreign page cannot send without being asked for leave."""

    async def run(sitting: Sitting) -> int:
        async with TestClient(TestServer(application(sitting, key="k"))) as client:
            reply = await client.post("/k/undo", data='{"name": "Ada"}')
            return reply.status

    with sitting_of(tmp_path) as (sitting, _):
        assert asyncio.run(run(sitting)) == 415


# --- the command and the browser -------------------------------------------------------------


@contextmanager
def served(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the real command; yield the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train.cli", "annotate", *words, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"label here: (http://127\.0\.0\.1:\d+/\S+/)", line):
                yield found[1], process
                break
        else:
            raise AssertionError(said)
    finally:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait(timeout=20)


def stop(process: subprocess.Popen[str], number: int = signal.SIGINT) -> str:
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    return said


def begin(browser: Browser, address: str, name: str) -> None:
    browser.goto(address)
    browser.wait("document.activeElement.id === 'name'")
    browser.evaluate("document.getElementById('name').value = ''")
    browser.write(name)
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait("!document.getElementById('answers').hidden")


def place(browser: Browser) -> str:
    return str(browser.evaluate("document.getElementById('place').textContent"))


def press(browser: Browser, key: str, then: str, **more: Any) -> None:
    browser.key(key, **more)
    browser.wait(f"document.getElementById('place').textContent === {then!r}")


def test_two_people_label_by_keyboard_through_a_kill_and_the_card_reads_it(
    verdicts: Path, tmp_path: Path
) -> None:
    chromium_program()
    gold = tmp_path / "gold"
    with Browser(tmp_path / "profile") as browser:
        with served(str(verdicts), "--sample", "12") as (address, process):
            begin(browser, address, "Ada")
            assert place(browser) == "0 of 12"
            for number, key in enumerate(("a", "B", "ArrowLeft", "t", "s"), start=1):
                press(browser, key, f"{number} of 12")
            press(browser, "u", "4 of 12")
            press(browser, "z", "3 of 12", control=True)
            press(browser, "ArrowRight", "4 of 12")
            browser.key("x")  # no answer
            process.kill()
            process.wait(timeout=20)
        kept = (gold / LABELS).read_text().splitlines()
        assert [json.loads(line)["label"] for line in kept[3:]] != []
        assert len(kept) == 8 and not (gold / "manifest.json").exists()
        with served(str(verdicts), "--sample", "12") as (address, process):
            begin(browser, address, "Ada")
            assert place(browser) == "4 of 12"
            for name in ("Ada", "Bo", "Cy"):
                begin(browser, address, name)
                for number in range(int(place(browser).split()[0]) + 1, 13):
                    press(browser, "ab"[number % 2], f"{number} of 12")
                browser.wait("!document.getElementById('finished').hidden")
            said = stop(process)
        assert process.returncode == 0
        assert "12 gold pairs by 3 people" in said and "rlaif report" in said
    rows = load_gold(gold)
    assert all(row.annotators == ["Ada", "Bo", "Cy"] for row in rows.values())
    assert read_manifest(gold)["annotators"]["Bo"]["labels"] == 12
    figures = figures_of(card_of_folder(verdicts))
    assert figures["agreement.accuracy"] + figures["agreement.human_ceiling"] > 0


def figures_of(card: ReportCard) -> dict[str, float]:
    return {
        figure.name: figure.estimate.value
        for _, figure in card.figures()
        if figure.estimate.value is not None
    }


def test_hostile_texts_stay_texts_and_fit_a_phone(tmp_path: Path) -> None:
    chromium_program()
    row = Candidates(
        prompt_id="p",
        prompt=HOSTILE,
        completions=[
            Completion(completion_id="a", completion=HOSTILE + "w" * 400, model="secret-model"),
            Completion(completion_id="b", completion="</div><script>1</script>", model="other"),
        ],
    )
    with ShardWriter[Candidates](tmp_path / "candidates", "candidates") as writer:
        writer.append(row)
        writer.finish({})
    words = ("--candidates", str(tmp_path / "candidates"), "--rubric", "helpfulness")
    with served(*words) as (address, process), Browser(tmp_path / "profile") as browser:
        browser.look(360, 740, phone=True)
        begin(browser, address, "Ada <b>")
        drawn = str(browser.evaluate("document.documentElement.outerHTML"))
        assert browser.evaluate("document.title") == "Which answer is better?"
        assert browser.evaluate("document.querySelectorAll('img, main script, b b').length") == 0
        assert "&lt;script&gt;" in drawn and "\u2039U+202E\u203a" in drawn
        assert "secret-model" not in drawn
        assert not any(character in drawn for character in HIDDEN)
        assert browser.evaluate("document.documentElement.scrollWidth") == 360
        # What slipped through all the same would not run: the policy forbids it.
        browser.evaluate(
            "document.body.insertAdjacentHTML('beforeend', "
            "'<img src=x onerror=\"document.title=1\">'); "
            "document.body.append(Object.assign(document.createElement('script'), "
            "{textContent: 'document.title = 2'}))"
        )
        assert browser.evaluate("document.title") == "Which answer is better?"
        browser.evaluate("document.querySelector('[data-answer=tie]').click()")
        browser.wait("!document.getElementById('finished').hidden")
        stop(process, signal.SIGTERM)
        browser.evaluate("document.getElementById('undo').click()")
        browser.wait("!document.getElementById('problem').hidden")
        assert "The server does not answer" in str(browser.evaluate("document.body.innerText"))


def test_a_port_in_use_is_a_clear_line(verdicts: Path) -> None:
    with served(str(verdicts)) as (address, _):
        port = address.split(":")[2].split("/")[0]
        done = subprocess.run(
            [sys.executable, "-m", "train.cli", "annotate", str(verdicts), "--port", port,
             "--out", str(verdicts.parent / "other")],
            capture_output=True, text=True, env={**os.environ}, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_calibrate_the_judge(verdicts: Path, tmp_path: Path) -> None:
    drawn = sample_items(AnnotateOptions(verdicts=verdicts, sample=60))
    log = AnnotationLog(tmp_path / "gold", drawn)
    for number, item in enumerate(drawn):
        log.append(entry("Ada", item, "ab"[number % 2]))
    log.close()
    options = CalibrateOptions(
        verdicts=verdicts, gold=tmp_path / "gold", out=tmp_path / "calibration.json"
    )
    (fitted,) = calibrate(options)
    assert fitted.calibration.pairs + fitted.held_out == 60
