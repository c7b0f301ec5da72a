"""Result files of AlpacaEval, LLMBar and RewardBench.

Field layouts as those projects write them: AlpacaEval ``annotations.json``, LLMBar ``result.json``
and RewardBench's per-prompt ``eval-set-scores`` files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from feedback.errors import InputError
from feedback.importing import (
    ImportOptions,
    Judged,
    completion_of,
    read_objects,
    text_field,
    verdict_of,
)
from feedback.records import GoldPair, PromptText, content_id

__all__ = ["read_alpaca_eval", "read_llmbar", "read_reward_bench"]


def read_alpaca_eval(options: ImportOptions) -> Iterator[Judged]:
    """Yield ``annotations.json``: preference 1 is output_1, 2 is output_2, 1.5 a tie.

    A preference in between is the weighted judge's probability. The order shown is drawn from a
    seed and not recorded; where the raw completion names ``m`` (shown first) it can be told, else
    the verdict is flagged ``order_unknown``.

    Raises:
        InputError: a field is missing, or a preference lies outside 1 to 2.
    """
    for number, row in read_objects(options.source):
        prompt = text_field(row, "instruction", options.source, number)
        sides = [
            completion_of(
                text_field(row, f"output_{side}", options.source, number),
                str(row.get(f"generator_{side}", f"output_{side}")),
            )
            for side in (1, 2)
        ]
        prompt_id = content_id("alpaca_eval", prompt)
        ids = (sides[0].completion_id, sides[1].completion_id)
        preference = row.get("preference")
        p_1: float | None = None
        if isinstance(preference, int | float) and preference == preference and preference >= 0:
            if not 1 <= preference <= 2:
                raise InputError(
                    f"preference {preference} is not between 1 and 2",
                    path=options.source,
                    line=number,
                )
            p_1 = 2 - float(preference)
        shown = _alpaca_order(row, ids, p_1)
        soft = p_1 is not None and p_1 not in (0.0, 0.5, 1.0)
        verdict = verdict_of(
            judge=options.judge or str(row.get("annotator", "alpaca_eval")),
            template=options.template or str(row.get("annotator", "alpaca_eval")),
            prompt_id=prompt_id,
            shown=shown or ids,
            winner=None if p_1 in (None, 0.5) else ids[0 if (p_1 or 0) > 0.5 else 1],
            outcome="unparsed" if p_1 is None else None,
            p_first=None if not soft or p_1 is None else p_1 if (shown or ids) == ids else 1 - p_1,
            reply=_reply(row.get("raw_completion")),
            order_known=shown is not None,
        )
        yield Judged(
            prompt_id=prompt_id,
            prompt=prompt,
            completions=sides if ids[0] != ids[1] else sides[:1],
            verdicts=[verdict] if ids[0] != ids[1] else [],
            meta={"dataset": row["dataset"]} if "dataset" in row else {},
        )


def _alpaca_order(
    row: dict[str, Any], ids: tuple[str, str], p_1: float | None
) -> tuple[str, str] | None:
    """Return the ids in the order shown, or None where the file does not tell."""
    named = row.get("referenced_models")
    if isinstance(named, dict) and named.get("m") in ("output_1", "output_2"):
        return ids if named["m"] == "output_1" else (ids[1], ids[0])
    raw = row.get("raw_completion")
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError:
            return None
    if not isinstance(raw, dict) or p_1 is None or p_1 == 0.5:
        return None
    best = [
        entry.get("model")
        for entry in raw.get("ordered_models") or []
        if isinstance(entry, dict) and entry.get("rank") == 1
    ]
    if best not in (["m"], ["M"]):
        return None
    # m, shown first, won if and only if it is the model that the preference names.
    first_is_1 = (best == ["m"]) == (p_1 > 0.5)
    return ids if first_is_1 else (ids[1], ids[0])


def _reply(raw: Any) -> str:
    return raw if isinstance(raw, str) else "" if raw is None else json.dumps(raw)


def read_llmbar(options: ImportOptions) -> Iterator[Judged]:
    """Yield ``result.json``: winner "1" or "2" in candidate space, in both orders, gold in label.

    Where a protocol asks several rounds, the last one counts, as in that project's own scoring.
    Rating protocols have no order; their two entries are the same comparison and flagged so.

    Raises:
        InputError: a field is missing.
    """
    for number, row in read_objects(options.source):
        prompt = text_field(row, "input", options.source, number)
        sides = [
            completion_of(
                text_field(row, f"output_{side}", options.source, number), f"output_{side}"
            )
            for side in (1, 2)
        ]
        ids = (sides[0].completion_id, sides[1].completion_id)
        results = row.get("results")
        if not isinstance(results, list) or not results:
            raise InputError("field 'results' is missing", path=options.source, line=number)
        prompt_id = content_id("llmbar", prompt, *ids)
        verdicts = []
        for swap in (False, True):
            found = results[-1].get(f"swap = {swap}")
            if not isinstance(found, dict):
                continue
            winner = {"1": ids[0], "2": ids[1]}.get(str(found.get("winner")))
            completion = found.get("completion")
            reply = completion[0] if isinstance(completion, list) and completion else ""
            verdicts.append(
                verdict_of(
                    judge=options.judge or options.source.resolve().parent.parent.name,
                    template=options.template or options.source.resolve().parent.name,
                    prompt_id=prompt_id,
                    shown=(ids[1], ids[0]) if swap else ids,
                    winner=winner,
                    outcome=None if winner else "unparsed",
                    reply=str(reply),
                    order_known=completion is not None,
                )
            )
        label = {1: "a", 2: "b"}.get(row.get("label", 0))
        yield Judged(
            prompt_id=prompt_id,
            prompt=prompt,
            completions=sides,
            verdicts=verdicts,
            gold=[]
            if label is None
            else [GoldPair(prompt_id=prompt_id, a=ids[0], b=ids[1], label=label)],  # type: ignore[arg-type]
        )


def read_reward_bench(options: ImportOptions) -> Iterator[Judged]:
    """Yield RewardBench's per-prompt results: 1 right, 0 wrong, 0.5 an error or a tie.

    The file is one object of columns (``results``, ``subset``, ``id``, ``text_chosen``,
    ``text_rejected``, ``scores_chosen`` ...), or one row a line. Generative judges are shown a
    shuffled order that is not stored, and an unreadable reply is stored as 0.5: where there are no
    scores to tell a tie by, 0.5 comes in as unparsed.

    Raises:
        InputError: a field is missing, or the columns differ in length.
    """
    for number, row in _reward_bench_rows(options):
        chosen, rejected = _reward_text(row, "chosen"), _reward_text(row, "rejected")
        if chosen is None or rejected is None or not isinstance(row.get("results"), int | float):
            missing = "results" if chosen is not None and rejected is not None else "text_chosen"
            raise InputError(f"field {missing!r} is missing", path=options.source, line=number)
        prompt: PromptText = row.get("prompt") or ""
        prompt_id = f"reward_bench/{row.get('id', number)}"
        sides = [
            completion_of(chosen, str(row.get("chosen_model", "chosen"))),
            completion_of(rejected, str(row.get("rejected_model", "rejected"))),
        ]
        ids = (sides[0].completion_id, sides[1].completion_id)
        result = float(row["results"])
        scored = row.get("scores_chosen") is not None
        half = "tie" if scored else "unparsed"
        judge = options.judge or str(row.get("model", "reward_bench"))
        verdict = verdict_of(
            judge=judge,
            template=options.template or str(row.get("model_type", "reward_bench")),
            prompt_id=prompt_id,
            shown=ids,
            winner={1.0: ids[0], 0.0: ids[1]}.get(result),
            outcome=None if result in (0.0, 1.0) else half,  # type: ignore[arg-type]
            order_known=False,
        )
        same = ids[0] == ids[1]
        yield Judged(
            prompt_id=prompt_id,
            prompt=prompt,
            completions=sides[:1] if same else sides,
            verdicts=[] if same else [verdict],
            gold=[] if same else [GoldPair(prompt_id=prompt_id, a=ids[0], b=ids[1], label="a")],
            meta={"subset": row["subset"]} if "subset" in row else {},
        )


def _reward_text(row: dict[str, Any], side: str) -> str | None:
    value = row.get(f"text_{side}", row.get(side))
    if isinstance(value, list):
        return "\n".join(str(turn.get("content", "")) for turn in value if isinstance(turn, dict))
    return value if isinstance(value, str) else None


def _reward_bench_rows(options: ImportOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in read_objects(options.source):
        if not isinstance(row.get("results"), list):
            yield number, row
            continue
        size = len(row["results"])
        columns = {key: value for key, value in row.items() if isinstance(value, list)}
        if wrong := next((key for key, value in columns.items() if len(value) != size), None):
            raise InputError(
                f"column {wrong!r} has {len(columns[wrong])} entries, 'results' has {size}",
                path=options.source,
            )
        rest = {key: value for key, value in row.items() if key not in columns}
        for place in range(size):
            yield place + 1, rest | {key: value[place] for key, value in columns.items()}
