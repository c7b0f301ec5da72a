"""Published numbers, recomputed from the recorded verdicts and votes of others."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feedback.agreement import unanimous, vote_structure
from feedback.intervals import Resampler
from feedback.length_control import Duels, controlled_win_rate, prompt_difficulty
from feedback.observations import collect
from feedback.position import position_section
from feedback.records import GoldPair, JudgeIdentity, Outcome, Verdict


def rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gold_pairs(rows: list[dict[str, Any]], source: str) -> list[GoldPair]:
    return [
        GoldPair(
            prompt_id=row["prompt"],
            a=f"{row['id']}/a",
            b=f"{row['id']}/b",
            label=row["label"],
            votes=row["votes"],
        )
        for row in rows
        if row["source"] == source
    ]


def test_position_bias_of_a_real_judge(shared_data: Path) -> None:
    """0.724 the same, 0.103 first place twice, 0.019 second place twice, over 18,599 pairs."""
    outcomes: dict[str, tuple[Outcome, str | None]] = {
        "1": ("decided", "first"),
        "2": ("decided", "second"),
        "3": ("tie", None),
        "-1": ("unparsed", None),
    }
    place: Counter[str] = Counter()
    verdicts = []
    for row in rows_of(shared_data / "judge_votes_both_orders.jsonl.gz"):
        style = row["style"].removesuffix("-gpt-4-reviewer-threeclass")
        if "oa-generations" not in style:
            continue
        first, second = style.split("-vs-")
        outcome, winner = outcomes[str(row["verdict"])]
        verdicts.append(
            Verdict(
                verdict_id=row["id"],
                prompt_id=str(place[style]),
                kind="pairwise",
                shown=[first, second],
                outcome=outcome,
                winner={"first": first, "second": second}.get(winner or ""),
                judge=JudgeIdentity(model=row["judge"]),
                template="threeclass",
                template_sha256="",
            )
        )
        place[style] += 1
    (pairs,) = collect(verdicts)
    section = position_section(pairs, Resampler(pairs.prompt, replicates=200))
    figures = {figure.name.split(".")[1]: figure.estimate for figure in section.figures}
    assert figures["order_consistency"].n == 18_599
    assert round(figures["order_consistency"].value, 3) == 0.724
    assert round(figures["first_slot_both"].value, 3) == 0.103
    assert round(figures["second_slot_both"].value, 3) == 0.019
    assert figures["order_consistency"].low < 0.724 < figures["order_consistency"].high
    # 953 prompts, not 18,599 independent rows: the interval is wider than the binomial one.
    assert figures["order_consistency"].prompts == 953
    assert figures["order_consistency"].high - figures["order_consistency"].low > 0.0129


def test_pandalm_people_are_unanimous_in_879_of_999(shared_data: Path) -> None:
    gold = gold_pairs(rows_of(shared_data / "human_pairs.jsonl.gz"), "pandalm")
    estimate = unanimous(gold)
    assert estimate.n == 999
    assert estimate.value == pytest.approx(879 / 999)
    assert set(sum(pattern) for pattern in vote_structure(gold)) == {3}


def test_vote_structure_of_ukp(shared_data: Path) -> None:
    """Five votes on 9,902 of 10,006 pairs, four on the rest; 2,068 unanimous for one side."""
    structure = vote_structure(
        gold_pairs(rows_of(shared_data / "human_pairs.jsonl.gz"), "ukpconvarg")
    )
    sizes: Counter[int] = Counter()
    for pattern, count in structure.items():
        sizes[sum(pattern)] += count
    assert sizes == {5: 9_902, 4: 104}
    assert structure[5, 0, 0] == 2_068
    assert structure[0, 0, 5] == 81
    assert structure[4, 0, 1] == 749 + 734


def test_length_controlled_win_rates_are_near_the_published_ones(shared_data: Path) -> None:
    """AlpacaEval 2, weighted GPT-4 turbo: raw win rates to rounding, controlled ones to two points.

    The published fit uses prompt difficulties and extra rows that are not in the verdicts, so the
    controlled rates agree closely, not exactly.
    """
    published = {  # model: (win rate, length-controlled win rate), percent
        "FuseChat-Llama-3.1-8B-Instruct": (63.33, 65.39),
        "FuseChat-Llama-3.2-1B-Instruct": (29.92, 25.27),
        "claude-2.1": (15.73, 25.25),
        "gpt-3.5-turbo-0301": (9.62, 18.09),
        "gemma-7b-it": (6.94, 10.43),
        "vicuna-13b": (5.83, 9.22),
    }
    lengths = {
        (row["p"], row["model"], row["v"]): len(row["text"])
        for row in rows_of(shared_data / "alpaca_eval_responses.jsonl.gz")
    }
    found: dict[str, list[tuple[float, float, int]]] = {}
    for row in rows_of(shared_data / "alpaca_eval_judgments.jsonl.gz"):
        model, baseline = (row["p"], row["b"], row["bv"]), (row["p"], row["a"], row["av"])
        if row["judge"] != "weighted_alpaca_eval_gpt4_turbo" or row["a"] != "gpt4_1106_preview":
            continue
        if row["b"] != row["a"] and model in lengths and baseline in lengths:
            gap = float(lengths[model] - lengths[baseline])
            found.setdefault(row["b"], []).append((row["pref"] - 1, gap, row["p"]))
    duels = []
    for name, rows in found.items():
        table = np.array(rows)
        duels.append(Duels(name, table[:, 0], table[:, 1], table[:, 2].astype(int)))
    difficulty = prompt_difficulty(duels, 805)
    checked = 0
    for duel in duels:
        if duel.model in published:
            raw, controlled = published[duel.model]
            checked += 1
            assert 100 * duel.win.mean() == pytest.approx(raw, abs=0.01)
            estimate = controlled_win_rate(duel, difficulty)
            assert estimate.value is not None
            assert 100 * estimate.value == pytest.approx(controlled, abs=2.0)
    assert checked == len(published)
