"""Small hand-made verdicts for the report card's tests."""

from __future__ import annotations

from collections.abc import Sequence

from feedback.observations import Material, Pairs, PromptOf, collect
from feedback.records import Completion, GoldPair, JudgeIdentity, Outcome, Verdict

JUDGE = JudgeIdentity(model="judge")


def verdict(
    prompt: str,
    shown: Sequence[str],
    said: str,
    *,
    p_first: float | None = None,
    repeat: int = 0,
    template: str = "pairwise",
    judge: JudgeIdentity = JUDGE,
    mass: float | None = None,
) -> Verdict:
    """Return a pairwise verdict; ``said`` is 1, 2 (the place), T (tie) or ? (unparsed)."""
    outcome: Outcome = {"T": "tie", "?": "unparsed", "!": "failed"}.get(said, "decided")  # type: ignore[assignment]
    return Verdict(
        verdict_id=f"{prompt}/{'/'.join(shown)}/{template}/{judge.model}/{repeat}",
        prompt_id=prompt,
        kind="pairwise",
        shown=list(shown),
        outcome=outcome,
        winner=shown[int(said) - 1] if outcome == "decided" else None,
        probs=None if p_first is None else [p_first, 1 - p_first],
        mass=mass,
        judge=judge,
        template=template,
        template_sha256=template,
        reply=said,
        repeat=repeat,
    )


def pairs_of(*orders: str, prompts: Sequence[str] | None = None) -> Pairs:
    """Return one pair (x, y) per word: what was said with x first, then with y first.

    ``"12"``: x won in both orders; ``"11"``: the first place won both times.
    """
    verdicts = []
    for number, word in enumerate(orders):
        prompt = prompts[number] if prompts else f"p{number}"
        names = (f"x{number}", f"y{number}")
        for said, shown in zip(word, (names, names[::-1]), strict=False):
            if said != "-":
                verdicts.append(verdict(prompt, shown, said))
    return collect(verdicts)[0]


def with_texts(
    pairs: Sequence[tuple[str, str, str, str | None]],
    *,
    models: tuple[str, str] = ("m", "m"),
    votes: Sequence[Sequence[str]] | None = None,
) -> Pairs:
    """Return pairs from (text x, text y, what was said, gold): see ``pairs_of`` for the third."""
    verdicts: list[Verdict] = []
    prompts: dict[str, PromptOf] = {}
    gold: dict[tuple[str, str, str], GoldPair] = {}
    for number, (x, y, word, label) in enumerate(pairs):
        prompt, names = f"p{number}", (f"x{number}", f"y{number}")
        texts = dict(zip(names, zip((x, y), models, strict=True), strict=True))
        prompts[prompt] = PromptOf(
            f"question {number}",
            {
                name: Completion(completion_id=name, completion=text, model=model)
                for name, (text, model) in texts.items()
            },
            {},
        )
        for said, shown in zip(word, (names, names[::-1]), strict=False):
            if said != "-":
                verdicts.append(verdict(prompt, shown, said))
        if label is not None:
            gold[prompt, *names] = GoldPair(
                prompt_id=prompt,
                a=names[0],
                b=names[1],
                label=label,  # type: ignore[arg-type]
                votes=list(votes[number]) if votes else [],  # type: ignore[arg-type]
            )
    return collect(verdicts, material=Material(prompts), gold=gold)[0]
