"""The arms of an A/B test as running judges: engines shared, verdicts on disk, asked bit by bit.

Arms that name the same engine share one. Each arm's verdicts are an ordinary verdict folder, so a
stopped test continues without paying twice and ``rlaif report`` reads any arm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from feedback.abtest import AbtestOptions, ArmOptions
from feedback.backends import Backend
from feedback.backends.opening import open_backend
from feedback.errors import InputError, RecipeError
from feedback.inputs import checked_candidates
from feedback.judge import Judge, Question
from feedback.judge_options import JudgeOptions
from feedback.labeling_run import LabelingRun
from feedback.labeling_setup import make_budget, make_judge, open_cache
from feedback.observations import Pairs, collect, load_gold, load_material
from feedback.ordering import pair_questions
from feedback.progress import ProgressBar
from feedback.records import Candidates, Completion, GoldPair, Verdict, content_id
from feedback.run_folder import claim_folder
from feedback.shards import read_rows
from feedback.templates import describe, load_template

__all__ = ["Arm", "GoldItem", "arm_names", "arm_pairs", "gold_items", "open_arms"]


class GoldItem(NamedTuple):
    """A gold pair with the texts it speaks of."""

    gold: GoldPair
    candidates: Candidates
    first: Completion
    second: Completion

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the prompt and the two completion ids in sorted order."""
        one, two = sorted((self.gold.a, self.gold.b))
        return self.gold.prompt_id, one, two


def gold_items(options: AbtestOptions) -> list[GoldItem]:
    """Return the gold pairs that have a winner, prompts in a seeded order.

    Raises:
        InputError: no gold pair has a winner, or one speaks of texts that are not there.
    """
    gold = load_gold(options.gold)
    if not gold:
        raise InputError("holds no gold pairs", path=options.gold)
    rows = {row.prompt_id: row for row in checked_candidates(options.candidates)}
    items, ties = [], 0
    for pair in gold.values():
        if pair.label == "tie":
            ties += 1
            continue
        row = rows.get(pair.prompt_id)
        texts = {one.completion_id: one for one in row.completions} if row is not None else {}
        if row is None or pair.a not in texts or pair.b not in texts:
            raise InputError(
                f"prompt {pair.prompt_id!r}: completions {pair.a!r} and {pair.b!r} are not all in "
                f"{options.candidates}",
                path=options.gold,
            )
        items.append(GoldItem(pair, row, texts[pair.a], texts[pair.b]))
    if not items:
        raise InputError(
            f"all {ties} gold pairs are ties: no judge can be right or wrong about them",
            path=options.gold,
        )
    return sorted(items, key=lambda item: content_id("abtest", options.seed, item.gold.prompt_id))


def arm_names(arms: Sequence[ArmOptions]) -> list[str]:
    """Return the arms' names, told apart by number where two would be the same.

    Raises:
        RecipeError: there are fewer than two arms, or two of them ask the same thing.
    """
    if len(arms) < 2:
        raise RecipeError("an A/B test needs two or more [[abtest.arms]]")
    asked = [(load_template(arm.template).sha256, arm.rubric, arm.engine, arm.read) for arm in arms]
    for place, entry in enumerate(asked):
        if entry in asked[:place]:
            other = asked.index(entry)
            raise RecipeError(
                f"arms {other + 1} and {place + 1} are identical: same template text, rubric, "
                "judge and way of reading; there is nothing to compare"
            )
    names: list[str] = []
    for arm in arms:
        name = arm.name or load_template(arm.template).name
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


@dataclass(slots=True)
class Arm:
    """One arm while it runs."""

    name: str
    judge: Judge
    folder: Path
    labeling: LabelingRun

    def ask(self, items: Iterable[GoldItem]) -> None:
        """Ask about the items in both orders; what is on disk already is not asked again."""
        listed = list(items)
        with ProgressBar(self.name, 2 * len(listed)) as bar:
            self.labeling.ask_all(_questions(listed), bar)

    def finish(self) -> None:
        """Make the verdict folder complete."""
        self.labeling.finish(
            {
                "stage": "abtest",
                "judge": dataclasses.asdict(self.judge.identity),
                "template": describe(self.judge.template),
                "orders": "both",
            }
        )

    def verdicts(self) -> list[Verdict]:
        """Return what the arm has said so far."""
        return list(read_rows(self.folder, Verdict))


def _questions(items: Iterable[GoldItem]) -> Iterator[Question]:
    for item in items:
        yield from pair_questions(item.candidates, [(item.first, item.second)])


@contextlib.contextmanager
def open_arms(options: AbtestOptions, names: Sequence[str]) -> Iterator[list[Arm]]:
    """Open every arm's judge and folder; engines are shared where arms name the same one.

    Raises:
        BackendError: an engine cannot give what a template needs.
        ShardError: a folder was begun with other settings, or another run writes it.
    """
    with contextlib.ExitStack() as closing:
        engines: dict[Any, Backend] = {}
        arms = []
        for name, arm in zip(names, options.arms, strict=True):
            settings = JudgeOptions(
                candidates=options.candidates,
                out=options.out / "arms" / _file_name(name),
                engine=arm.engine,
                template=arm.template,
                rubric=arm.rubric,
                read=arm.read,
                cache=str(options.out / "arms" / f"{_file_name(name)}.sqlite"),
            )
            key = repr(arm.engine)
            if key not in engines:
                engines[key] = open_backend(arm.engine)
                closing.callback(engines[key].close)
            arms.append(_open_arm(name, settings, engines[key], closing))
        yield arms


def _open_arm(
    name: str, settings: JudgeOptions, backend: Backend, closing: contextlib.ExitStack
) -> Arm:
    template = load_template(settings.template)
    if template.kind != "pairwise":
        raise RecipeError(f"arm {name!r}: template {template.name!r} does not compare pairs")
    judge = make_judge(settings, template, backend)
    cache = open_cache(settings, judge)
    if cache is not None:
        closing.callback(cache.close)
    record = {
        "judge": dataclasses.asdict(judge.identity),
        "template": describe(template),
        "rubric": judge.rubric,
        "read": settings.read,
    }
    run = LabelingRun(
        judge,
        backend,
        folder=settings.out,
        budget=make_budget(settings),
        cache=cache,
        claim=functools.partial(claim_folder, settings.out, record),
    )
    closing.callback(run.close)
    return Arm(name, judge, settings.out, run)


def _file_name(name: str) -> str:
    return "".join(one if one.isalnum() or one in "-_." else "-" for one in name)


def arm_pairs(arm: Arm, options: AbtestOptions) -> Pairs | None:
    """Return an arm's pairs as columns, with texts and gold; None where it has said nothing."""
    found = collect(
        arm.verdicts(),
        material=load_material([options.candidates]),
        gold=load_gold(options.gold),
    )
    return found[0] if found else None
