"""Judges with planted biases: verdicts whose truth is known, to test what measures them.

A simulated judge sees each answer's quality through noise and adds what was planted:

    logit P(first place) = sensitivity * (q1 - q2) + position + length * tanh(dl / sd)
                           + own * (own1 - own2) + noise

A tie label takes part in the softmax with its own logit. The rows are ordinary verdicts, candidates
and gold pairs, so that all that reads real ones reads these.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from feedback.observations import Material, Pairs, PromptOf, collect
from feedback.records import Completion, GoldPair, JudgeIdentity, Outcome, Verdict

__all__ = ["Planted", "Simulated", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """What is planted in a simulated judge; all in logits unless said otherwise."""

    sensitivity: float = 1.5
    """Weight of the difference in quality (quality has standard deviation 1)."""
    position: float = 0.0
    """Bonus of the place shown first."""
    length: float = 0.0
    """Pull of tanh of the standardised difference in length."""
    own: float = 0.0
    """Bonus of the judge's own family's answer."""
    noise: float = 0.0
    """Standard deviation of what each call adds at random."""
    lean: float = 0.5
    """Standard deviation of the judge's private taste for each answer, the same in every pair and
    order that shows it: what makes rows of a prompt go together."""
    tie: float | None = None
    """Logit of a tie label; None: there is none."""
    unparsed: float = 0.0
    """Share of calls that end without a verdict."""
    soft: bool = False
    """Verdicts carry their probabilities and name the largest; else one is drawn from them."""
    votes: int = 0
    """People who vote on each pair, each seeing quality through noise; 0: gold has no votes."""
    repeats: int = 1
    """How often each question is asked."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulated labelling run left behind."""

    verdicts: list[Verdict]
    material: Material
    gold: dict[tuple[str, str, str], GoldPair]

    def pairs(self) -> Pairs:
        """Return the judge's pairs with texts and gold."""
        return collect(self.verdicts, material=self.material, gold=self.gold)[0]


def simulate(
    planted: Planted,
    *,
    prompts: int = 200,
    completions: int = 3,
    seed: int = 0,
    judge: str = "own-judge",
    template: str = "pairwise",
) -> Simulated:
    """Sample prompts with ``completions`` answers each, and judge every pair in both orders.

    Answer 0 of a prompt is by a model of the judge's family, the others are not; which one is
    longer has nothing to do with quality.
    """
    random = np.random.default_rng(seed)
    quality = random.normal(size=(prompts, completions))
    length = np.round(np.exp(random.normal(5.3, 0.5, (prompts, completions)))).astype(int)
    sd = math.sqrt(2) * float(np.std(length)) or 1.0
    lean = random.normal(0, planted.lean, (prompts, completions))
    material: dict[str, PromptOf] = {}
    verdicts: list[Verdict] = []
    gold: dict[tuple[str, str, str], GoldPair] = {}
    identity = JudgeIdentity(model=judge)
    for prompt in range(prompts):
        name = f"prompt-{prompt:05d}"
        # Ids are drawn, so that the sorted order of two ids says nothing of who wrote them.
        ids = [f"{word:08x}" for word in random.choice(2**32, completions, replace=False)]
        material[name] = PromptOf(
            f"Question {prompt}",
            {
                ids[place]: Completion(
                    completion_id=ids[place],
                    completion=_text(int(length[prompt, place])),
                    model="own-policy" if place == 0 else f"other{place}-policy",
                )
                for place in range(completions)
            },
            {"topic": f"topic {prompt % 4}"},
        )
        for one, two in itertools.combinations(range(completions), 2):
            drift = float(quality[prompt, one] - quality[prompt, two])
            gold_pair = _gold(name, ids[one], ids[two], drift, planted, random)
            first, second = sorted((ids[one], ids[two]))
            gold[name, first, second] = gold_pair
            for left, right in ((one, two), (two, one)):
                logit = (
                    planted.sensitivity * (quality[prompt, left] - quality[prompt, right])
                    + (lean[prompt, left] - lean[prompt, right])
                    + planted.position
                    + planted.length
                    * math.tanh((length[prompt, left] - length[prompt, right]) / sd)
                    + planted.own * (float(left == 0) - float(right == 0))
                )
                for repeat in range(planted.repeats):
                    noisy = logit + planted.noise * random.normal()
                    verdicts.append(
                        _verdict(name, (ids[left], ids[right]), noisy, planted, random,
                                 identity=identity, template=template, repeat=repeat)
                    )  # fmt: skip
    return Simulated(verdicts, Material(material), gold)


def _text(length: int) -> str:
    return ("word " * (length // 5 + 1))[:length]


def _gold(
    prompt: str, a: str, b: str, drift: float, planted: Planted, random: np.random.Generator
) -> GoldPair:
    votes = [
        "a" if drift + random.normal(0, 0.8) > 0 else "b" for _ in range(planted.votes)
    ]  # fmt: skip
    return GoldPair(
        prompt_id=prompt,
        a=a,
        b=b,
        label="a" if drift > 0 else "b",
        votes=votes,  # type: ignore[arg-type]
        gap=abs(drift),
    )


def _verdict(
    prompt: str,
    shown: tuple[str, str],
    logit: float,
    planted: Planted,
    random: np.random.Generator,
    *,
    identity: JudgeIdentity,
    template: str,
    repeat: int,
) -> Verdict:
    logits = [logit / 2, -logit / 2] + ([] if planted.tie is None else [planted.tie])
    weights = [math.exp(value - max(logits)) for value in logits]
    probs = [weight / sum(weights) for weight in weights]
    place = probs.index(max(probs))
    if not planted.soft:
        draw = random.random()
        place = next((at for at in range(len(probs)) if draw < sum(probs[: at + 1])), 0)
    outcome: Outcome = "tie" if place == 2 else "decided"
    lost = random.random() < planted.unparsed
    if lost:
        outcome = "unparsed"
    return Verdict(
        verdict_id=f"{prompt}/{shown[0]}/{shown[1]}/{template}/{repeat}",
        prompt_id=prompt,
        kind="pairwise",
        shown=list(shown),
        outcome=outcome,
        judge=identity,
        template=template,
        template_sha256=template,
        probs=probs if planted.soft and not lost else None,
        mass=0.97 if planted.soft else None,
        winner=shown[place] if outcome == "decided" else None,
        reply="" if lost else "ABC"[place],
        repeat=repeat,
    )
