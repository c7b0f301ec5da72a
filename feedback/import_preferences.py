"""Preferences made elsewhere: `trl`-style rows, HH-style dialogues, UltraFeedback-style rows.

``trl`` and ``hh`` give candidates (to judge anew), gold pairs (the labels that came with them) and
preferences (to train on as they are). ``ultrafeedback`` gives candidates and the ratings as
verdicts of their judge, one for each aspect, of which ``rlaif report`` makes a card and ``rlaif
pair`` preferences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from feedback.errors import InputError, nearest
from feedback.import_sources import rows_of
from feedback.importing import ImportOptions, Judged, completion_of
from feedback.records import (
    Completion,
    GoldPair,
    JudgeIdentity,
    Message,
    Preference,
    PromptText,
    Verdict,
    content_id,
    normalise_text,
)

__all__ = ["read_hh", "read_trl", "read_ultrafeedback"]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_UNLABELLED = ("n/a", "na", "none", "")


class _Pair(NamedTuple):
    """One labelled pair, with its prompt taken out of both sides."""

    prompt: PromptText
    chosen: str
    rejected: str


class _Row(NamedTuple):
    """A row and where it stands."""

    values: Mapping[str, Any]
    options: ImportOptions
    number: int

    def wrong(self, message: str) -> InputError:
        return InputError(message, path=self.options.source, line=self.number)

    def column(self, name: str) -> Any:
        """Return the value of the column that ``--column-NAME`` names.

        Raises:
            InputError: there is no such column; names the nearest.
        """
        column = getattr(self.options, f"column_{name}")
        if column not in self.values:
            raise self.wrong(
                f"no column {column!r}{nearest(column, self.values)} (name yours with "
                f"--column-{name})"
            )
        return self.values[column]


# --- trl -------------------------------------------------------------------------------------


def read_trl(options: ImportOptions) -> Iterator[Judged]:
    """Yield pairs of `trl`'s preference forms: text or messages, prompt apart or inside.

    Raises:
        InputError: a row is of none of them; names file and line.
    """
    for number, values in rows_of(options):
        row = _Row(values, options, number)
        yield _judged(row, _trl_pair(row))


def _trl_pair(row: _Row) -> _Pair | str:
    """Return the pair of a row, or why there is none in it."""
    chosen, rejected = row.column("chosen"), row.column("rejected")
    prompt = row.values.get(row.options.column_prompt)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str | list):
            raise row.wrong(
                f"no column {row.options.column_prompt!r} beside the texts (name yours with "
                "--column-prompt; dialogues with Human: and Assistant: are --format hh)"
            )
        return _Pair(_messages(row, prompt) if isinstance(prompt, list) else prompt,
                     chosen, rejected)  # fmt: skip
    before = _messages(row, prompt) if isinstance(prompt, list) else []
    return _last_turns(_messages(row, chosen), _messages(row, rejected), before, prompt)


def _messages(row: _Row, value: Any) -> list[Message]:
    if isinstance(value, list) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return [Message(role=turn["role"], content=turn["content"]) for turn in value]
    raise row.wrong("prompt, chosen and rejected must be text, or lists of {role, content}")


def _last_turns(
    chosen: list[Message], rejected: list[Message], before: list[Message], prompt: Any
) -> _Pair | str:
    """Return the pair of two dialogues that differ in their last turn only."""
    if not chosen or not rejected:
        return "empty"
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        return "differ before the last turn"
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "do not end with an assistant's turn"
    # A prompt column beside whole dialogues repeats their first turns; beside answers it is all.
    whole: PromptText = shared if shared[: len(before)] == before else [*before, *shared]
    if not whole:
        if not isinstance(prompt, str):
            return "without a prompt"
        whole = prompt
    return _Pair(whole, chosen[-1]["content"], rejected[-1]["content"])


# --- hh --------------------------------------------------------------------------------------


def read_hh(options: ImportOptions) -> Iterator[Judged]:
    r"""Yield pairs of dialogues written as text, ``\n\nHuman: ...\n\nAssistant: ...``.

    Raises:
        InputError: a text is no such dialogue; names file and line.
    """
    for number, values in rows_of(options):
        row = _Row(values, options, number)
        sides = [_dialogue(row, name) for name in ("chosen", "rejected")]
        yield _judged(row, _last_turns(sides[0], sides[1], [], None))


def _dialogue(row: _Row, name: str) -> list[Message]:
    text = row.column(name)
    if not isinstance(text, str):
        raise row.wrong(f"{name} is {type(text).__name__}, not text")
    head, *parts = _TURN.split("\n\n" + text.lstrip())
    if head.strip() or not parts:
        raise row.wrong(f"{name} does not begin with 'Human:' or 'Assistant:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [Message(role=_ROLES[who], content=said.strip()) for who, said in turns]


# --- what pairs become -----------------------------------------------------------------------


def _judged(row: _Row, pair: _Pair | str) -> Judged:
    if isinstance(pair, str):
        return Judged(prompt_id="", prompt="", left_out=pair)
    if not pair.chosen.strip() or not pair.rejected.strip():
        return Judged(prompt_id="", prompt="", left_out="empty")
    if normalise_text(pair.chosen) == normalise_text(pair.rejected):
        return Judged(prompt_id="", prompt="", left_out="equal on both sides")
    name = row.values.get(row.options.column_id)
    prompt_id = str(name) if name is not None else content_id(pair.prompt)
    sides = [
        completion_of(text, str(row.values.get(f"{side}_model") or row.options.model))
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    gap = _gap(row)
    label = GoldPair(
        prompt_id=prompt_id,
        a=sides[0].completion_id,
        b=sides[1].completion_id,
        label="tie" if gap == 0 else "a",
        gap=gap,
    )
    return Judged(
        prompt_id=prompt_id,
        prompt=pair.prompt,
        completions=sides,
        gold=[label],
        preferences=[_preference(row, pair, prompt_id, gap)],
    )


def _gap(row: _Row) -> float | None:
    """Return how far apart the row's own scores are; None where it has none."""
    scores = [row.values.get(f"score_{side}") for side in ("chosen", "rejected")]
    if not all(isinstance(score, int | float) for score in scores):
        return None
    gap = float(scores[0]) - float(scores[1])  # type: ignore[arg-type]
    if gap < 0:
        raise row.wrong("score_chosen is below score_rejected")
    return gap


def _preference(row: _Row, pair: _Pair, prompt_id: str, gap: float | None) -> Preference:
    """Return the row's own label; a row that carries a probability keeps it."""
    p = row.values.get("p_chosen")
    if p is not None and not (isinstance(p, int | float) and 0.5 <= p <= 1):
        raise row.wrong(f"p_chosen is {p!r}, outside [0.5, 1]")
    tie = bool(row.values.get("tie")) or gap == 0
    known = 0.5 if tie and p is None else 1.0 if p is None else float(p)
    chat = not isinstance(pair.prompt, str)
    sides: list[PromptText] = [
        [Message(role="assistant", content=text)] if chat else text
        for text in (pair.chosen, pair.rejected)
    ]
    return Preference(
        prompt=pair.prompt,
        chosen=sides[0],
        rejected=sides[1],
        margin=gap if gap is not None else 2 * known - 1,
        p_chosen=known,
        prompt_id=prompt_id,
        tie=tie,
        source={"imported": row.options.source_name, "row": row.number},
    )


# --- ultrafeedback ---------------------------------------------------------------------------


def read_ultrafeedback(options: ImportOptions) -> Iterator[Judged]:
    """Yield prompts with several completions, each rated on several aspects.

    Raises:
        InputError: a row has no instruction or completions, or a rating is no number.
    """
    for number, values in rows_of(options):
        row = _Row(values, options, number)
        prompt = values.get("instruction", values.get("prompt"))
        answers = values.get("completions")
        if not isinstance(prompt, str) or not isinstance(answers, list):
            raise row.wrong("needs text in 'instruction' and a list in 'completions'")
        name = values.get("id", values.get(options.column_id))
        prompt_id = str(name) if name is not None else content_id(prompt)
        completions: dict[str, Completion] = {}
        verdicts: list[Verdict] = []
        for answer in answers:
            made = _answer(row, answer)
            if made.completion_id in completions or not made.completion.strip():
                continue
            completions[made.completion_id] = made
            verdicts += _ratings(row, answer, prompt_id, made.completion_id)
        yield Judged(
            prompt_id=prompt_id,
            prompt=prompt,
            completions=list(completions.values()),
            verdicts=verdicts,
            meta={"source": values["source"]} if isinstance(values.get("source"), str) else {},
        )


def _answer(row: _Row, answer: Any) -> Completion:
    text = answer.get("response", answer.get("completion")) if isinstance(answer, Mapping) else None
    if not isinstance(text, str):
        raise row.wrong("each of completions needs text in 'response'")
    return completion_of(text, str(answer.get("model") or row.options.model))


def _ratings(
    row: _Row, answer: Mapping[str, Any], prompt_id: str, completion_id: str
) -> Iterator[Verdict]:
    """Yield one rating verdict for each aspect; one that says N/A is unparsed."""
    judge = row.options.judge or "gpt-4"
    template = row.options.template or "ultrafeedback"
    for aspect, annotation in sorted((answer.get("annotations") or {}).items()):
        if annotation is None:
            continue
        rating, rationale = _rating(row, aspect, annotation)
        yield Verdict(
            verdict_id=content_id("import", judge, template, prompt_id, completion_id, aspect),
            prompt_id=prompt_id,
            kind="rating",
            shown=[completion_id],
            outcome="unparsed" if rating is None else "decided",
            judge=JudgeIdentity(model=judge),
            template=template,
            template_sha256="",
            scores=None if rating is None else [rating],
            rationale=rationale,
            meta={"criterion": aspect},
        )


def _rating(row: _Row, aspect: str, annotation: Any) -> tuple[float | None, str | None]:
    if not isinstance(annotation, Mapping) or "Rating" not in annotation:
        raise row.wrong(f"the annotation of {aspect!r} has no 'Rating'")
    said = annotation["Rating"]
    reasons: Sequence[Any] = [
        annotation.get(name) for name in ("Rationale For Rating", "Rationale")
    ]
    rationale = next((text for text in reasons if isinstance(text, str)), None)
    if said is None or str(said).strip().lower() in _UNLABELLED:
        return None, rationale
    try:
        return float(said), rationale
    except (TypeError, ValueError):
        raise row.wrong(f"the rating of {aspect!r} is {said!r}, not a number") from None
