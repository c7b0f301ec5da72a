"""Judgments of MT-bench (FastChat) and Arena-Hard: two games per pair, one in each order.

The judgment files name models and questions; the texts lie in ``question.jsonl`` and the folder
``model_answer`` of the same benchmark and are read where they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback.errors import InputError
from feedback.importing import ImportOptions, Judged, read_objects, verdict_of
from feedback.records import Completion, JudgeIdentity, Message, Outcome, Verdict, content_id

__all__ = ["read_arena_hard", "read_mt_bench"]

_ARENA_WORDS = {
    "A>>B": 1.0,
    "A>B": 1.0,
    "B<A": 1.0,
    "B<<A": 1.0,
    "A=B": 0.0,
    "B=A": 0.0,
    "B>A": -1.0,
    "A<B": -1.0,
    "B>>A": -1.0,
    "A<<B": -1.0,
}


@dataclass(frozen=True, slots=True)
class _Texts:
    """Questions and answers by id; empty where their files were not given."""

    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(model, question) -> one text per turn."""

    def prompt(self, question: str, turn: int, model: str) -> str | list[Message]:
        """Return the prompt of a turn: what was asked so far, ``model``'s first answer between."""
        found = self.questions.get(question)
        if found is None:
            return ""
        if isinstance(found.get("prompt"), str):
            return str(found["prompt"])
        turns = [
            str(text["content"] if isinstance(text, dict) else text) for text in found["turns"]
        ]
        if turn == 1 or len(turns) == 1:
            return turns[0]
        between = (self.answers.get((model, question)) or [""])[0]
        return [
            Message(role="user", content=turns[0]),
            Message(role="assistant", content=between),
            Message(role="user", content=turns[1]),
        ]

    def completion(self, model: str, question: str, turn: int) -> Completion | None:
        """Return a model's answer in a turn, or None without its text."""
        found = self.answers.get((model, question))
        if not found or len(found) < turn:
            return None
        return Completion(completion_id=model, completion=found[turn - 1], model=model)


def _load(options: ImportOptions, id_name: str) -> _Texts:
    texts = _Texts()
    if options.questions is not None:
        for _, row in read_objects(options.questions):
            texts.questions[str(row.get(id_name, row.get("question_id")))] = row
    if options.answers is not None:
        if not options.answers.is_dir():
            raise InputError("no such folder of answers", path=options.answers)
        for path in sorted(options.answers.glob("*.jsonl*")):
            for number, row in read_objects(path):
                model = str(row.get("model_id", row.get("model")))
                question = str(row.get(id_name, row.get("question_id")))
                texts.answers[model, question] = _turns(row, path, number)
    return texts


def _turns(row: dict[str, Any], path: Path, number: int) -> list[str]:
    """Return the answer's turns, in either benchmark's layout."""
    if "messages" in row:
        content = row["messages"][-1]["content"]
        return [str(content["answer"] if isinstance(content, dict) else content)]
    try:
        turns = row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError("neither 'messages' nor 'choices'", path=path, line=number) from error
    return [str(turn["content"] if isinstance(turn, dict) else turn) for turn in turns]


def read_mt_bench(options: ImportOptions) -> Iterator[Judged]:
    """Yield FastChat's ``*_pair.jsonl`` (two games) or ``*_single.jsonl`` (scores).

    ``g1_winner`` is the verdict with model_1 first, ``g2_winner`` with model_2 first, both in
    candidate space; "error" is unparsed. A single score of -1 is an error. Pair rows that were made
    from two single scores (they carry ``m1_score``) have no order. Of rows that occur twice (runs
    append) the first counts.

    Raises:
        InputError: a field is missing.
    """
    texts = _load(options, "question_id")
    seen: set[tuple[Any, ...]] = set()
    for number, row in read_objects(options.source):
        if "question_id" not in row or not {"model_1", "model"} & set(row):
            raise InputError(
                "neither a pair nor a single judgment of FastChat", path=options.source, line=number
            )
        turn = int(row.get("turn") or 1)
        judge, template = _fastchat_judge(row, options)
        key = (row["question_id"], row.get("model_1", row.get("model")), row.get("model_2"), turn,
               judge, template)  # fmt: skip
        if key in seen:
            continue
        seen.add(key)
        question = str(row["question_id"])
        prompt_id = f"mt_bench/{question}/turn{turn}"
        models = [str(row[name]) for name in ("model_1", "model_2") if name in row] or [
            str(row["model"])
        ]
        verdicts = (
            _games(row, prompt_id, judge, template, (models[0], models[1]))
            if len(models) == 2
            else [_single(row, prompt_id, judge, template, models[0])]
        )
        completions = (texts.completion(model, question, turn) for model in models)
        category = texts.questions.get(question, {}).get("category")
        yield Judged(
            prompt_id=prompt_id,
            prompt=texts.prompt(question, turn, models[0]),
            completions=[completion for completion in completions if completion is not None],
            verdicts=verdicts,
            meta={"turn": turn} | ({"category": category} if category else {}),
        )


def _fastchat_judge(row: dict[str, Any], options: ImportOptions) -> tuple[str, str]:
    named = row.get("judge")
    parts = [str(part) for part in named] if isinstance(named, list | tuple) else [str(named or "")]
    judge = options.judge or parts[0] or "unknown"
    # Turn 2 has a template of its own in FastChat's files; one arm holds both turns.
    return judge, options.template or "mt_bench"


def _games(
    row: dict[str, Any], prompt_id: str, judge: str, template: str, models: tuple[str, str]
) -> list[Verdict]:
    verdicts = []
    for game, shown in (("g1", models), ("g2", (models[1], models[0]))):
        said = row.get(f"{game}_winner")
        winner = {"model_1": models[0], "model_2": models[1]}.get(str(said))
        outcome: Outcome | None = None
        if winner is None and said != "tie":
            outcome = "unparsed"
        verdicts.append(
            verdict_of(
                judge=judge,
                template=template,
                prompt_id=prompt_id,
                shown=shown,
                winner=winner,
                outcome=outcome,
                reply=str(row.get(f"{game}_judgment") or ""),
                order_known="m1_score" not in row,
            )
        )
    return verdicts[:1] if "m1_score" in row else verdicts


def _single(row: dict[str, Any], prompt_id: str, judge: str, template: str, model: str) -> Verdict:
    score = row.get("score")
    known = isinstance(score, int | float) and score >= 0
    return Verdict(
        verdict_id=content_id("import", judge, template, prompt_id, model),
        prompt_id=prompt_id,
        kind="rating",
        shown=[model],
        outcome="decided" if known else "unparsed",
        judge=JudgeIdentity(model=judge),
        template=f"{template}-single",
        template_sha256="",
        scores=[float(score)] if known else None,  # type: ignore[arg-type]
        reply=str(row.get("judgment") or ""),
    )


def read_arena_hard(options: ImportOptions) -> Iterator[Judged]:
    """Yield Arena-Hard's ``model_judgment`` files, v0.1 and v2.0; a file or the judge's folder.

    Game 1 shows the baseline as A, game 2 the model. A game without a score is unparsed, a game
    that is null failed. Strong and plain verdicts (``A>>B``, ``A>B``) both count as decided.

    Raises:
        InputError: a field is missing.
    """
    texts = _load(options, "uid")
    paths = sorted(options.source.glob("*.jsonl")) if options.source.is_dir() else [options.source]
    for path in paths:
        for number, row in read_objects(path):
            question = str(row.get("uid", row.get("question_id", "")))
            games = row.get("games")
            if not question or not isinstance(games, list) or "model" not in row:
                raise InputError(
                    "field 'uid', 'model' or 'games' is missing", path=path, line=number
                )
            model = str(row["model"])
            baseline = str(row.get("baseline") or "gpt-4-0314")
            judge = options.judge or str(row.get("judge") or path.resolve().parent.name)
            prompt_id = f"arena_hard/{question}"
            shown = ((baseline, model), (model, baseline))
            verdicts = [
                _arena_game(game, prompt_id, judge, options.template or "arena_hard", pair)
                for game, pair in zip(games, shown, strict=False)
            ]
            completions = (texts.completion(name, question, 1) for name in (baseline, model))
            yield Judged(
                prompt_id=prompt_id,
                prompt=texts.prompt(question, 1, model),
                completions=[completion for completion in completions if completion is not None],
                verdicts=verdicts,
                meta={"category": row["category"]} if row.get("category") else {},
            )


def _arena_game(
    game: Any, prompt_id: str, judge: str, template: str, shown: tuple[str, str]
) -> Verdict:
    if not isinstance(game, dict):
        return verdict_of(judge=judge, template=template, prompt_id=prompt_id, shown=shown,
                          winner=None, outcome="failed")  # fmt: skip
    judgment = game.get("judgment")
    reply = judgment.get("answer", "") if isinstance(judgment, dict) else judgment or ""
    value = _ARENA_WORDS.get(str(game.get("score")))
    winner = None if value is None else {1.0: shown[0], -1.0: shown[1]}.get(value)
    return verdict_of(
        judge=judge,
        template=template,
        prompt_id=prompt_id,
        shown=shown,
        winner=winner,
        outcome="unparsed" if value is None else None,
        reply=str(reply),
    )
