"""Importers on small invented files of each project's true layout, and the folders they leave."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import InputError, RecipeError
from feedback.importing import FORMATS, ImportOptions, run
from feedback.observations import Pairs
from feedback.records import ORDER_UNKNOWN, Candidates, GoldPair, Verdict
from feedback.report_run import read_evidence
from feedback.shards import read_manifest, read_rows


def write(path: Path, rows: list[dict[str, Any]] | dict[str, Any], *, lines: bool = False) -> Path:
    if lines:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def imported(out: Path) -> Pairs:
    return read_evidence([out / "verdicts"]).arms[0]


# --- plain pairs -----------------------------------------------------------------------------


def test_pairs_with_both_orders_in_a_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q1", "a": "yes", "b": "no", "verdict": "A", "verdict_swapped": "B",
         "judge": "me", "gold": "a", "votes": ["a", "a", "b"], "meta": {"topic": "t"}},
        {"prompt": "q2", "a": "yes", "b": "no", "verdict": "A", "verdict_swapped": "A",
         "judge": "me", "gold": "tie"},
        {"prompt": "q3", "a": "yes", "b": "no", "verdict": "C", "verdict_swapped": "nonsense",
         "judge": "me"},
    ]  # fmt: skip
    source = write(tmp_path / "rows.jsonl", rows, lines=True)
    run(ImportOptions(source=source, out=tmp_path / "out"))
    pairs = imported(tmp_path / "out")
    said = {pairs.prompt_ids[pairs.prompt[row]]: pairs.winner[row] for row in range(3)}
    candidates = {row.prompt: row for row in read_rows(tmp_path / "out/candidates", Candidates)}
    yes = {row.prompt: row.prompt_id for row in candidates.values()}
    sign = 1 if candidates["q1"].completions[0].completion_id == pairs.a[0] else -1
    assert (said[yes["q1"]] * sign).tolist() == [1.0, 1.0]  # yes, in both orders
    assert sorted(said[yes["q2"]].tolist()) == [-1.0, 1.0]  # the first place, both times
    assert pairs.outcomes == {"decided": 4, "tie": 1, "unparsed": 1}
    gold = {row.prompt_id: row for row in read_rows(tmp_path / "out/gold", GoldPair)}
    assert gold[yes["q1"]].votes == ["a", "a", "b"]
    assert gold[yes["q2"]].label == "tie"
    assert read_manifest(tmp_path / "out/verdicts")["counts"]["decided"] == 4


def test_pairs_with_names_columns_and_gzip(tmp_path: Path) -> None:
    """One order a row, no texts, other column names, words for candidates."""
    rows = [
        {"question": "7", "left": "m1", "right": "m2", "says": "right", "who": "j"},
        {"question": "7", "left": "m2", "right": "m1", "says": "left", "who": "j"},
    ]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    run(
        ImportOptions(
            source=path,
            out=tmp_path / "out",
            column_id="question",
            column_model_a="left",
            column_model_b="right",
            column_verdict="says",
            column_judge="who",
            words_first=("left",),
            words_second=("right",),
        )
    )
    pairs = imported(tmp_path / "out")
    assert (pairs.a, pairs.b) == (["m1"], ["m2"])
    assert pairs.winner.tolist() == [[-1.0, -1.0]]
    assert not (tmp_path / "out/candidates").exists()


def test_pairs_with_probabilities(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "a": "yes", "b": "no", "p": 0.8, "p_swapped": 0.6}]
    source = write(tmp_path / "rows.jsonl", rows, lines=True)
    run(ImportOptions(source=source, out=tmp_path / "out", judge="me"))
    pairs = imported(tmp_path / "out")
    yes = "unknown:" + pairs.a[0].split(":")[1]
    first = pairs.mean_p[0] if pairs.completions[0][0].completion == "yes" else 1 - pairs.mean_p[0]
    assert yes
    assert first == pytest.approx(0.7)
    assert pairs.soft


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "a": "x", "b": "y", "verdict": "A"}, "say who judged with --judge"),
        ({"prompt": "q", "a": "x", "verdict": "A", "judge": "j"}, "no text in column 'b'"),
        ({"prompt": "q", "a": "x", "b": "x", "verdict": "A", "judge": "j"}, "the same"),
        ({"prompt": "q", "a": "x", "b": "y", "judge": "j"}, "--column-verdict"),
        ({"prompt": "q", "a": "x", "b": "y", "p": 1.2, "judge": "j"}, "not a probability"),
        (
            {"prompt": "q", "a": "x", "b": "y", "verdict": "A", "judge": "j", "gold": "up"},
            "gold label",
        ),
    ],
)
def test_wrong_pairs_name_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "rows.jsonl", [row], lines=True)
    with pytest.raises(InputError, match=message) as caught:
        run(ImportOptions(source=source, out=tmp_path / "out"))
    assert f"{source}:1: " in str(caught.value)


def test_broken_lines_name_file_and_line(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "q", "a": "x", "b": "y", "verdict": "A", "judge": "j"}\n{oops\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not valid JSON"):
        run(ImportOptions(source=source, out=tmp_path / "out"))


def test_an_import_never_adds_to_a_folder(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl", [{"prompt": "q", "a": "x", "b": "y", "gold": "a"}], lines=True
    )
    run(ImportOptions(source=source, out=tmp_path / "out"))
    with pytest.raises(InputError, match="already holds rows"):
        run(ImportOptions(source=source, out=tmp_path / "out"))


def test_unknown_formats_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'mt_bench'"):
        ImportOptions(source=tmp_path, out=tmp_path, format="mt-bench")


# --- AlpacaEval ------------------------------------------------------------------------------


def alpaca(preference: float | None, **more: Any) -> dict[str, Any]:
    return {
        "instruction": "Name a fruit.",
        "output_1": "Apple",
        "generator_1": "base",
        "dataset": "own",
        "output_2": "Pear",
        "generator_2": "new",
        "annotator": "weighted",
        "preference": preference,
    } | more


def one(tmp_path: Path, row: dict[str, Any]) -> Verdict:
    run(
        ImportOptions(
            source=write(tmp_path / "annotations.json", [row]),
            out=tmp_path / "out",
            format="alpaca_eval",
        )
    )
    (verdict,) = read_rows(tmp_path / "out/verdicts", Verdict)
    return verdict


def test_alpaca_eval_weighted(tmp_path: Path) -> None:
    verdict = one(tmp_path, alpaca(1.75))
    assert verdict.winner is not None
    assert verdict.winner.startswith("new:")
    assert verdict.probs == [0.25, 0.75]
    assert verdict.flags == [ORDER_UNKNOWN]
    assert verdict.judge.model == "weighted"


@pytest.mark.parametrize(
    ("preference", "outcome"), [(1.5, "tie"), (None, "unparsed"), (-1, "unparsed")]
)
def test_alpaca_eval_without_a_winner(
    tmp_path: Path, preference: float | None, outcome: str
) -> None:
    assert one(tmp_path, alpaca(preference)).outcome == outcome


def test_alpaca_eval_order_from_the_reply(tmp_path: Path) -> None:
    """m stood first; the model ranked 1 is m, and the preference says output_2: so 2 came first."""
    ranked = {"ordered_models": [{"model": "m", "rank": 1}, {"model": "M", "rank": 2}]}
    verdict = one(tmp_path, alpaca(2.0, raw_completion=json.dumps(ranked)))
    assert verdict.flags == []
    assert verdict.shown[0].startswith("new:")
    assert verdict.winner == verdict.shown[0]


def test_alpaca_eval_order_from_referenced_models(tmp_path: Path) -> None:
    named = {"M": "output_1", "m": "output_2"}
    verdict = one(tmp_path, alpaca(1.0, referenced_models=named))
    assert verdict.shown[0].startswith("new:")
    assert verdict.winner == verdict.shown[1]


def test_alpaca_eval_refuses_other_scales(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"preference 3 is not between 1 and 2"):
        one(tmp_path, alpaca(3))


# --- LLMBar and RewardBench ------------------------------------------------------------------


def test_llmbar(tmp_path: Path) -> None:
    """Winners are in candidate space; the folder's names are judge and protocol."""
    folder = tmp_path / "GPT-X" / "Vanilla"
    folder.mkdir(parents=True)
    rows = [
        {
            "input": "Say hello.",
            "output_1": "Hello!",
            "output_2": "Goodbye!",
            "label": 1,
            "results": [
                {
                    "swap = False": {"completion": ["Output (a)", "stop"], "winner": "1"},
                    "swap = True": {"completion": ["Output (a)", "stop"], "winner": "2"},
                }
            ],
        }
    ]
    source = write(folder / "result.json", rows)
    run(ImportOptions(source=source, out=tmp_path / "out", format="llmbar"))
    pairs = imported(tmp_path / "out")
    assert pairs.arm.name == "GPT-X · Vanilla"
    assert sorted(pairs.winner[0]) == [-1.0, 1.0]
    assert pairs.swapped.all()
    assert abs(pairs.gold[0]) == 1.0
    hello = 1.0 if pairs.completions[0][0].completion == "Hello!" else -1.0
    assert pairs.gold[0] == hello


def test_llmbar_ratings_have_no_order(tmp_path: Path) -> None:
    rows = [
        {
            "input": "q",
            "output_1": "x",
            "output_2": "y",
            "label": 2,
            "results": [{"swap = False": {"winner": "2"}, "swap = True": {"winner": "2"}}],
        }
    ]
    source = write(tmp_path / "result.json", rows)
    run(ImportOptions(source=source, out=tmp_path / "out", format="llmbar", judge="j"))
    pairs = imported(tmp_path / "out")
    assert pairs.both.all()
    assert not pairs.swapped.any()


def test_reward_bench_columns(tmp_path: Path) -> None:
    scores = {
        "id": [3, 4, 5],
        "subset": ["math", "math", "chat"],
        "results": [1, 0, 0.5],
        "text_chosen": ["right 3", "right 4", "right 5"],
        "text_rejected": ["wrong 3", "wrong 4", "wrong 5"],
        "model": "acme/rm",
        "model_type": "generative",
    }
    source = write(tmp_path / "scores.json", [scores])
    run(ImportOptions(source=source, out=tmp_path / "out", format="reward_bench"))
    pairs = imported(tmp_path / "out")
    assert pairs.outcomes == {"decided": 2, "unparsed": 1}
    from feedback.agreement import accuracy_halves
    from feedback.intervals import Resampler

    assert accuracy_halves(pairs, Resampler(pairs.prompt)).value == pytest.approx(0.5)
    assert {meta["subset"] for meta in pairs.meta} == {"math", "chat"}
    assert not pairs.order_known.any()


def test_reward_bench_with_scores_keeps_ties(tmp_path: Path) -> None:
    row = {
        "id": 1,
        "results": 0.5,
        "scores_chosen": 0.3,
        "scores_rejected": 0.3,
        "text_chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}],
        "text_rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}],
        "model": "rm",
    }
    source = write(tmp_path / "scores.jsonl", [row], lines=True)
    run(ImportOptions(source=source, out=tmp_path / "out", format="reward_bench"))
    assert imported(tmp_path / "out").outcomes == {"tie": 1}


def test_reward_bench_uneven_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "scores.json", [{"results": [1, 0], "text_chosen": ["x"]}])
    with pytest.raises(InputError, match="'text_chosen' has 1 entries, 'results' has 2"):
        run(ImportOptions(source=source, out=tmp_path / "out", format="reward_bench"))


# --- MT-bench and Arena-Hard -----------------------------------------------------------------


def mt_bench(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> Pairs:
    source = write(tmp_path / "judge_pair.jsonl", rows, lines=True)
    run(ImportOptions(source=source, out=tmp_path / "out", format="mt_bench", **more))
    return imported(tmp_path / "out")


def test_mt_bench_pairs(tmp_path: Path) -> None:
    """Winners are in candidate space; g2 shows model_2 first; appended reruns count once."""
    game = {
        "question_id": 81,
        "model_1": "alpha",
        "model_2": "beta",
        "g1_winner": "model_1",
        "g2_winner": "model_1",
        "judge": ["gpt-4", "pair-v2"],
        "g1_judgment": "[[A]]",
        "g2_judgment": "[[B]]",
        "turn": 1,
    }
    error = game | {"question_id": 82, "g1_winner": "error", "g2_winner": "tie"}
    second = game | {"judge": ["gpt-4", "pair-v2-multi-turn"], "turn": 2, "g2_winner": "model_2"}
    questions = write(
        tmp_path / "question.jsonl",
        [{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}],
        lines=True,
    )
    answers = tmp_path / "model_answer"
    answers.mkdir()
    for model in ("alpha", "beta"):
        row = {
            "question_id": 81,
            "model_id": model,
            "choices": [{"index": 0, "turns": [f"{model} 1", f"{model} 2"]}],
        }
        write(answers / f"{model}.jsonl", [row], lines=True)
    pairs = mt_bench(tmp_path, [game, game, error, second], questions=questions, answers=answers)
    found = {pairs.prompt_ids[pairs.prompt[row]]: pairs.winner[row].tolist() for row in range(3)}
    assert found["mt_bench/81/turn1"] == [1.0, 1.0]
    assert found["mt_bench/81/turn2"] == [1.0, -1.0]
    assert str(found["mt_bench/82/turn1"]) == "[nan, 0.0]"
    candidates = {row.prompt_id: row for row in read_rows(tmp_path / "out/candidates", Candidates)}
    turn2 = candidates["mt_bench/81/turn2"]
    assert [turn["content"] for turn in turn2.prompt] == ["Write.", "alpha 1", "Again."]
    assert [entry.completion for entry in turn2.completions] == ["alpha 2", "beta 2"]
    assert turn2.meta == {"turn": 2, "category": "writing"}


def test_mt_bench_pairs_made_of_scores_have_no_order(tmp_path: Path) -> None:
    row = {
        "question_id": 81, "model_1": "alpha", "model_2": "beta", "g1_winner": "model_2",
        "g2_winner": "model_2", "judge": ["gpt-4", "single-v1"], "m1_score": 3, "m2_score": 9,
    }  # fmt: skip
    pairs = mt_bench(tmp_path, [row])
    assert not pairs.order_known.any()
    assert pairs.verdict.tolist() == [-1.0]


def test_mt_bench_single_scores_become_pairs(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": 81,
            "model": model,
            "judge": ["gpt-4", "single-v1"],
            "score": score,
            "turn": 1,
        }
        for model, score in (("alpha", 9.0), ("beta", 4.0), ("gamma", -1))
    ]
    pairs = mt_bench(tmp_path, rows)
    assert (pairs.a, pairs.b) == (["alpha"], ["beta"])
    assert pairs.verdict.tolist() == [1.0]
    assert pairs.outcomes == {"decided": 2, "unparsed": 1}
    assert not pairs.ordered


def test_arena_hard(tmp_path: Path) -> None:
    """Game 1 shows the baseline first; a null game failed, one without a score is unparsed."""
    judged = [
        {"uid": "u1", "category": "hard", "judge": "gpt-x", "model": "new", "baseline": "old",
         "games": [{"score": "B>>A", "judgment": {"answer": "[[B>>A]]"}, "prompt": []},
                   {"score": "A>B", "judgment": {"answer": "[[A>B]]"}, "prompt": []}]},
        {"uid": "u2", "category": "hard", "judge": "gpt-x", "model": "new", "baseline": "old",
         "games": [{"score": "A=B", "judgment": "[[A=B]]"}, {"score": None, "judgment": "?"}]},
        {"question_id": "u3", "judge": "gpt-x", "model": "new",
         "games": [None, {"score": "A>>B", "judgment": "[[A>>B]]"}]},
    ]  # fmt: skip
    folder = tmp_path / "gpt-x"
    folder.mkdir()
    write(folder / "new.jsonl", judged, lines=True)
    run(ImportOptions(source=folder, out=tmp_path / "out", format="arena_hard"))
    pairs = imported(tmp_path / "out")
    rows = {pairs.prompt_ids[pairs.prompt[row]]: row for row in range(3)}
    new_first = pairs.a[rows["arena_hard/u1"]] == "new"
    assert pairs.winner[rows["arena_hard/u1"]].tolist() == (
        [1.0, 1.0] if new_first else [-1.0, -1.0]
    )
    assert pairs.outcomes == {"decided": 3, "tie": 1, "unparsed": 1, "failed": 1}
    assert "gpt-4-0314" in (pairs.a[rows["arena_hard/u3"]], pairs.b[rows["arena_hard/u3"]])


def test_every_format_is_there() -> None:
    import importlib

    for target in FORMATS.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "pairs"])
def test_wrong_files_are_one_clear_line(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "rows.jsonl", [{"nothing": 1}], lines=True)
    with pytest.raises(InputError) as caught:
        run(ImportOptions(source=source, out=tmp_path / "out", format=name))
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        run(ImportOptions(source=tmp_path / "none.json", out=tmp_path / "out", format=name))
