"""Writes the figures of ``benchmarks/results/pocket.json`` into the two shipped models' cards.

python -m recipes.pocket_model.cards
"""

from __future__ import annotations

import json
from pathlib import Path

from feedback.pocket import model_path
from feedback.shards import write_text

__all__ = ["figure_table"]

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "pocket.json"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_LINES = (
    (
        "judge_accuracy",
        "judge accuracy, constructed pairs of held-out dialogues and bookings, both orders averaged",
    ),
    ("judge_accuracy_dialogue", "of these, dialogues"),
    ("judge_accuracy_booking", "of these, bookings"),
    ("judge_order_consistency", "same winner in both orders"),
    ("judge_ece", "expected calibration error"),
    ("judge_accuracy_longer_is_worse", "accuracy where the longer reply is the worse one"),
    ("judge_accuracy_longer_is_better", "accuracy where it is the better one"),
    ("judge_verdict_mass", "probability on the two labels together"),
    ("judge_accuracy_true_vs_sample", "true turn against the model's own sample"),
    ("judge_accuracy_true_vs_sample_dialogue", "of these, dialogues"),
    ("judge_accuracy_true_vs_sample_booking", "of these, bookings"),
    ("judge_order_consistency_true_vs_sample", "the same, same winner in both orders"),
    ("judge_ece_true_vs_sample", "the same, expected calibration error"),
    ("policy_perplexity", "perplexity per token, held-out dialogues"),
    ("policy_eos_share", "share of replies that end by themselves"),
)


def figure_table(figures: dict[str, float], prefix: str) -> str:
    """Return the figures of one model as Markdown; ``prefix`` is empty or ``second_``."""
    lines = ["| measured on the CPU with these weights | |", "|---|---|"]
    lines += [f"| {words} | {figures[prefix + name]:.3f} |" for name, words in _LINES]
    flaws = {
        name.removeprefix(f"{prefix}judge_accuracy_").replace("_", " "): value
        for name, value in figures.items()
        if name.startswith(f"{prefix}judge_accuracy_")
        and name.removeprefix(prefix) not in dict(_LINES)
    }
    by_flaw = ", ".join(f"{name} {value:.2f}" for name, value in flaws.items())
    return "\n".join([*lines, "", f"Accuracy by flaw of the worse reply: {by_flaw}."])


def main() -> None:
    """Rewrite the block between the markers of both cards."""
    figures = json.loads(RESULT.read_text(encoding="utf-8"))["figures"]
    for name, prefix in (("policy", ""), ("second-judge", "second_")):
        path = model_path(name) / "README.md"
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise SystemExit(f"{path}: has no block between {BEGIN} and {END}")
        write_text(path, f"{before}{BEGIN}\n{figure_table(figures, prefix)}\n{END}{after}")


if __name__ == "__main__":
    main()
