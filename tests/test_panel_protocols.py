"""Several judges that rate, rank whole lists, or follow pairs chosen by answers."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scripted import Scripted, manifest_of
from test_protocols import REPLY_LABELS, engine, judge, judges, rankings  # noqa: F401

from feedback.comparing import comparisons
from feedback.config import EngineOptions
from feedback.errors import BudgetExceeded, RecipeError, RlaifError
from feedback.panel import CascadeOptions, Combination, PanelJudge, PanelOptions
from feedback.panel_ratings import (
    is_unsure_rating,
    panel_scores,
    rating_entropy,
    strongest_ratings,
)
from feedback.panel_report import score_agreement
from feedback.records import JudgeIdentity, Verdict
from feedback.shards import read_rows


def rating(name, score, *, member=0, probs=None, mass=0.9, outcome="decided", **fields) -> Verdict:
    return Verdict(
        verdict_id=f"{name}-{member}-{fields.get('repeat', 0)}-{score}",
        prompt_id="q",
        kind="rating",
        shown=[name],
        outcome=outcome,
        judge=JudgeIdentity(model=f"m{member}"),
        template="rating",
        template_sha256="0",
        scores=None if score is None else [score],
        probs=probs,
        mass=mass,
        meta={"member": member},
        **fields,
    )


SURE = [0.01, 0.01, 0.01, 0.01, 0.96]
SPREAD = [0.2, 0.2, 0.2, 0.2, 0.2]


def test_entropy_of_a_scale_is_a_share_of_the_largest():
    assert rating_entropy(rating("a", 3.0, probs=SPREAD)) == pytest.approx(1.0)
    assert rating_entropy(rating("a", 1.0, probs=[1.0, 0.0, 0.0, 0.0, 0.0])) == 0.0
    two = rating_entropy(rating("a", 1.5, probs=[0.5, 0.5, 0.0, 0.0, 0.0]))
    assert two == pytest.approx(math.log(2) / math.log(5))
    assert rating_entropy(rating("a", 3.0)) is None


@pytest.mark.parametrize(
    ("rows", "unsure"),
    [
        ([rating("a", 4.9, probs=SURE)], False),
        ([rating("a", 3.0, probs=SPREAD)], True),
        ([rating("a", 4.9, probs=SURE, mass=0.2)], True),
        ([rating("a", None, outcome="unparsed")], True),
        ([rating("a", None, outcome="refused")], True),
        ([rating("a", None, outcome="failed")], False),
        ([rating("a", 4.0), rating("a", 4.0, repeat=1)], False),
        ([rating("a", 4.0), rating("a", 2.0, repeat=1)], True),
    ],
)
def test_which_ratings_are_unsure(rows, unsure):
    assert is_unsure_rating(rows, CascadeOptions()) is unsure


def test_scores_of_a_panel_by_hand():
    rows = [
        rating("a", 4.0),
        rating("a", 3.0, member=1),
        rating("a", 1.0, member=2),
        rating("b", 2.0),
        rating("b", None, member=1, outcome="refused"),
        rating("b", None, member=2, outcome="unparsed"),
    ]
    mean = panel_scores(rows, Combination("mean", (1.0, 1.0, 2.0)))
    # b was scored by one judge of three, which is no majority: it has no score.
    assert mean == {"a": pytest.approx((4 + 3 + 2 * 1) / 4)}
    assert panel_scores(rows, Combination("majority", (1.0, 1.0, 2.0))) == {"a": 3.0}


def test_the_strong_rating_counts_where_there_is_one():
    first = [rating("a", 2.0), rating("b", 3.0), rating("c", 4.0), rating("d", 5.0)]
    strong = [
        rating("a", 5.0, member=1),
        rating("b", None, member=1, outcome="failed"),
        rating("c", None, member=1, outcome="refused"),
    ]
    kept = {row.shown[0]: row for row in strongest_ratings([*first, *strong])}
    assert [kept[name].scores for name in "acd"] == [[5.0], [4.0], [5.0]]
    assert kept["b"].outcome == "failed"  # until it is asked again
    scores = panel_scores([*first, *strong], Combination("cascade", (1.0, 1.0)))
    assert scores == {"a": 5.0, "c": 4.0, "d": 5.0}


def test_agreement_between_scores():
    scores = np.array([[4.2, 3.9], [2.0, 3.0], [1.0, math.nan], [5.0, 5.0]])
    assert score_agreement(scores).tolist() == [[1.0, 2 / 3], [2 / 3, 1.0]]


class Rater(Scripted):
    """Rates by worth; spreads its probability evenly where ``unsure`` says so."""

    def __init__(self, name, unsure=lambda value: False, shift=0.0):
        super().__init__(name)
        self.unsure, self.shift = unsure, shift

    def values(self, call):
        return [value + self.shift for value in super().values(call)]

    def answer(self, call):
        reply = super().answer(call)
        if self.unsure(super().values(call)[0]):
            even = math.log(self.mass / len(call.choices))
            object.__setattr__(reply, "choice_logprobs", dict.fromkeys(call.choices, even))
        return reply


def test_a_panel_of_raters(tmp_path, judges):  # noqa: F811
    judges["cheap"], judges["other"] = Rater("cheap"), Rater("other", shift=1.0)
    folder = judge(
        tmp_path,
        {"p": [1, 2, 3], "q": [4, 2, 1]},
        template="rating",
        panel=PanelOptions(judges=(PanelJudge(engine=engine("other"), weight=3.0),)),
    )
    report = manifest_of(folder)["panel"]
    assert (report["of"], report["pairs"], report["asked"]) == ("ratings", 6, [6, 6])
    assert report["agreement"] == [[1.0, 0.0], [0.0, 1.0]]  # one point apart everywhere
    assert report["effective_judges"] == pytest.approx(1.0, abs=0.01)  # and yet one voice
    row = rankings(tmp_path, folder)["p"]
    # Each rating is 0.92 on its point and 0.02 on the four others.
    expected = [0.92 * v + 0.02 * (15 - v) for v in (1, 2, 3, 4)]
    means = [(one + 3 * two) / 4 for one, two in itertools.pairwise(expected)]
    assert row.scores == pytest.approx(means, abs=1e-5)
    assert row.ranking == [[2], [1], [0]]
    assert len(row.comparisons) == 3 and row.source["method"] == "rating"


def test_a_cascade_of_raters_asks_the_strong_one_about_spread_ratings(
    tmp_path,
    judges,  # noqa: F811
):
    judges["cheap"] = Rater("cheap", unsure=lambda value: value == 2)
    judges["strong"] = Rater("strong")
    folder = judge(
        tmp_path,
        {"p": [1, 2, 5], "q": [2, 4]},
        template="rating",
        cascade=CascadeOptions(engine=engine("strong")),
    )
    assert len(judges["strong"].calls) == 2
    assert Counter(row.meta["member"] for row in read_rows(folder, Verdict)) == {0: 5, 1: 2}
    report = manifest_of(folder)["panel"]
    assert (report["asked"], report["calls"]) == ([5, 2], [5, 2])
    row = rankings(tmp_path, folder)["p"]
    assert row.ranking == [[2], [1], [0]]
    assert row.scores[1] == pytest.approx(0.92 * 2 + 0.02 * 13, abs=1e-5)  # the strong judge's
    found = {(row.a, row.b): row for row in comparisons(folder)}
    assert len(found) == 4
    assert found["p-0", "p-1"].p < 0.1
    judge(
        tmp_path,
        template="rating",
        cascade=CascadeOptions(engine=engine("strong")),
    )
    assert len(judges["strong"].calls) == 2, "asked again"


def order_by(sign: float):
    """Return a judge's reply: its order of the list shown, by worth or against it."""

    def reply(call) -> str:
        text = call.messages[-1]["content"]
        labels = [found[1] for found in REPLY_LABELS.finditer(text)]
        worth = [float(value) for value in Scripted.values(call)]
        ranked = sorted(zip(worth, labels, strict=True), key=lambda entry: -sign * entry[0])
        return " > ".join(label for _, label in ranked)

    return reply


def test_a_panel_of_list_makers(tmp_path, judges):  # noqa: F811
    judges["cheap"] = Scripted("cheap", text=order_by(1.0))
    judges["other"] = Scripted("other", text=order_by(1.0))
    judges["third"] = Scripted("third", text=order_by(-1.0))
    others = tuple(PanelJudge(engine=engine(name)) for name in ("other", "third"))
    folder = judge(
        tmp_path,
        {"p": [1, 2, 3]},
        template="listwise",
        panel=PanelOptions(judges=others, combine="majority"),
    )
    assert [row.p for row in comparisons(folder)] == [pytest.approx(1 / 3)] * 3
    report = manifest_of(folder)["panel"]
    assert report["agreement"] == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    row = rankings(tmp_path, folder)["p"]
    assert row.ranking == [[2], [1], [0]]
    assert row.source["method"] == "bradley-terry"


def test_the_first_judges_answers_choose_the_pairs_of_all(tmp_path, judges):  # noqa: F811
    judges["cheap"] = Scripted("cheap")
    judges["other"] = Scripted(
        "other", p=lambda first, second, call: 0.7 if first > second else 0.3
    )
    fields = {
        "pairs": "active",
        "pairs_per_prompt": 5,
        "panel": PanelOptions(judges=(PanelJudge(engine=engine("other")),)),
    }
    folder = judge(tmp_path, {"p": [3, 1, 2, 5, 4, 0]}, **fields)
    asked = {
        name: {
            frozenset(row.shown) for row in read_rows(folder, Verdict) if row.judge.model == name
        }
        for name in ("cheap", "other")
    }
    assert len(asked["cheap"]) == 5 and asked["other"] == asked["cheap"]
    assert len(judges["other"].calls) == 10
    assert all(row.p is not None for row in comparisons(folder))
    assert json.loads((folder / "run.json").read_text())["pairs"] == "active"
    judge(tmp_path, **fields)
    assert len(judges["other"].calls) == 10, "asked again"


def test_a_cascade_after_chosen_pairs(tmp_path, judges):  # noqa: F811
    judges["cheap"], judges["strong"] = Scripted("cheap"), Scripted("strong")
    folder = judge(
        tmp_path,
        {"p": [0, 0.1, 5, 9]},
        pairs="sort",
        cascade=CascadeOptions(engine=engine("strong"), unsure=0.1),
    )
    report = manifest_of(folder)["panel"]
    assert report["asked"][1] == 1 and report["asked"][0] < 6


def test_options_of_the_entropy_limit():
    with pytest.raises(RecipeError, match="max_entropy"):
        CascadeOptions(max_entropy=1.2)


WRONG_LATER_JUDGES = {
    "price": ({"engine": EngineOptions(backend="openai", model="unpriced")}, "needs the price"),
    "gold": ({"template": "pairwise-reference"}, "shows a known-good answer"),
    "key": ({"engine": EngineOptions(backend="openai", model="m")}, "needs a key"),
    "url": (
        {"engine": EngineOptions(backend="openai", model="m", base_url="ftp://h/v1")},
        "base_url",
    ),
    "batch": ({"engine": EngineOptions(backend="batch", model="m")}, "needs a key"),
    "extra": (
        {"engine": EngineOptions(backend="openai", model="m", extra={"tokeniser": "x"})},
        "unknown key",
    ),
    "replay": ({"engine": EngineOptions(backend="replay")}, "needs replay_from"),
    "model": ({"engine": EngineOptions(model="pocket:none")}, "pocket:none"),
    "folder": ({"engine": EngineOptions(model="./no-such-model")}, "no such file or folder"),
    "adapter": (
        {"engine": EngineOptions(model="m", lora=str(Path(__file__).parent))},
        "holds no LoRA adapter",
    ),
    "adapter of vllm": (
        {"engine": EngineOptions(backend="vllm", model="m", lora="./no-such-adapter")},
        "holds no LoRA adapter",
    ),
}


@pytest.mark.parametrize("form", ["panel", "cascade"])
@pytest.mark.parametrize("case", WRONG_LATER_JUDGES)
def test_a_later_judge_is_checked_before_the_first_is_asked(
    tmp_path,
    judges,  # noqa: F811
    monkeypatch,
    case,
    form,
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judges["cheap"] = Scripted("cheap")
    later, words = WRONG_LATER_JUDGES[case]
    later = {"engine": engine("other"), **later}
    several = (
        {"panel": PanelOptions(judges=(PanelJudge(**later),))}
        if form == "panel"
        else {"cascade": CascadeOptions(**later)}
    )
    limit = {"max_cost": 1.0} if case == "price" else {}
    with pytest.raises(RlaifError, match=words):
        judge(tmp_path, {"p": [1, 2, 3]}, **several, **limit)
    assert judges["cheap"].calls == []
    assert not (tmp_path / "verdicts").exists()


def test_a_dry_run_of_several_judges_says_what_is_left_and_the_total(
    tmp_path,
    judges,  # noqa: F811
    capsys,
):
    judges["cheap"], judges["other"] = Scripted("cheap"), Scripted("other")
    panel = PanelOptions(judges=(PanelJudge(engine=engine("other")),))
    with pytest.raises(BudgetExceeded):
        judge(tmp_path, {"p": [1, 2, 3]}, panel=panel, max_calls=8)
    capsys.readouterr()
    judge(tmp_path, panel=panel, dry_run=True)
    said = capsys.readouterr().out
    assert "0 calls to cheap (6 verdicts are on disk already)" in said
    assert "4 calls to other (2 verdicts are on disk already)" in said
    assert "all 2 judges: 4 calls, about" in said
    fields = {"pairs": "sort", "panel": panel, "dry_run": True, "on_change": "set-aside"}
    judge(tmp_path, **fields)
    assert "all 2 judges: at most 12 calls, about" in capsys.readouterr().out
