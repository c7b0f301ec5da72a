"""The comparison as one page: the table, the gold-against-KL curves, and the two experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from feedback.intervals import Estimate
from feedback.page.components import Cell, Section, paragraph, plot, plots, table
from feedback.page.plots import SERIES, SOFT, draw, interval_plot
from feedback.page.shell import render_page

__all__ = ["NAMES", "render_comparison"]

NAMES = {
    "sft": "SFT",
    "bon": "Best of n",
    "dpo": "DPO",
    "rrhf": "RRHF",
    "ppo": "PPO",
}
_LABELS = {
    "hard": "hard labels, one order",
    "soft": "soft labels, both orders",
    "corrected": "soft, both orders, length taken out",
}


def render_comparison(record: Mapping[str, Any]) -> str:
    """Return the page of a comparison's record, as text."""
    sections = []
    if record["methods"]:
        sections += [_methods(record), _curves(record), _cost(record)]
    if "labels" in record:
        sections.append(_labels(record))
    if "bias" in record:
        sections.append(_bias(record))
    return render_page(
        title="Five ways to use one judge's labels",
        kicker="comparison",
        subtitle=(
            "The same candidates and verdicts, the same number of tokens passed forward and "
            f"backward; scored by {_scored_by(record)}."
        ),
        sections=sections,
        facts=[
            ("tokens per training", f"{record['tokens']:,}"),
            ("seeds", ", ".join(map(str, record["seeds"]))),
            ("judges", ", ".join(record["judges"])),
            ("best of n", f"n = {record['best_of']}"),
        ],
    )


def _scored_by(record: Mapping[str, Any]) -> str:
    own = record.get("judges_that_labelled", [])
    if not own:
        return "judges and checks that labelled nothing"
    return f"judges and checks, of which {', '.join(own)} labelled what was trained on"


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    return None if value is None else Estimate(**value)


def _first(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(iter(row["win_rate"].values()))
    return found


def _methods(record: Mapping[str, Any]) -> Section:
    rows, points = [], []
    spread = len(record["seeds"]) > 1
    for algorithm, row in record["methods"].items():
        rate = _first(row)
        rows.append(
            [
                NAMES[algorithm],
                Cell(_estimate(rate["win_rate"]), percent=True),
                Cell(_estimate(rate["at_equal_length"]), percent=True),
                *([row["spread"]["win_rate"]] if spread else []),
                _estimate(row["gold"]),
                row["kl"],
                row["reward"],
                round(row["length"]),
                round(row["seconds"]),
                round(row["peak_mib"]),
                row["models_held"],
            ]
        )
        points.append(
            (
                NAMES[algorithm],
                rate["win_rate"]["value"],
                rate["win_rate"]["low"],
                rate["win_rate"]["high"],
            )
        )
    head = [
        "", "win rate", "at equal length", *(["spread"] if spread else []), "gold", "KL", "reward",
        "chars", "s", "MiB", "models",
    ]  # fmt: skip
    return Section(
        "methods",
        "Against the starting policy",
        f"Win rate over {record['start']}, both orders, level ones half; intervals by prompt over "
        "all seeds"
        + ("; the spread is the standard deviation between seeds" if spread else "")
        + ". KL in nats per completion (best of n: log n - (n - 1) / n). Seconds and memory are "
        "those of one training (best of n: of its samples), memory above that of an idle process; "
        "models are sets of weights held at one time. SFT is on each prompt's best completion.",
        [
            table(head, rows),
            plot(
                interval_plot(points, name="win-rates", x_label="win rate", fair=0.5),
                caption="Win rate with its 95% interval.",
                meaning="Right of the dashed line the trained policy is preferred.",
            ),
        ],
    )


def _curves(record: Mapping[str, Any]) -> Section:
    drawn: list[Markup] = []
    for key, label in (("gold", "gold check"), ("reward", "reward model")):
        series = {
            NAMES[name]: [(p["kl"], p[key]) for p in points if p["kl"] is not None]
            for name, points in record["curves"].items()
            if any(point[key] is not None for point in points)
        }
        if series:
            drawn.append(
                plot(
                    _scatter(series, name=f"curve-{key}", y_label=label),
                    caption=f"{label.capitalize()} against the distance from the start.",
                    meaning="Where the reward rises and gold does not, the reward is being gamed.",
                )
            )
    return Section(
        "curves",
        "Gold against KL",
        "From the start over copies of each policy on its way to its end (first seed); best of n "
        "for growing n. The distance is the square root of the KL divergence to the start.",
        [plots(drawn)] if drawn else [paragraph("The prompts carry no gold check.")],
    )


def _scatter(series: Mapping[str, list[tuple[float, float]]], *, name: str, y_label: str) -> Markup:
    def paint(axes: Any) -> None:
        for place, (label, points) in enumerate(series.items()):
            distances = [max(kl, 0.0) ** 0.5 for kl, _ in points]
            values = [value for _, value in points]
            colour = SERIES[place % len(SERIES)]
            axes.plot(distances, values, "o-", color=colour, label=label, markersize=4)
        axes.set_xlabel("sqrt KL (nats)")
        axes.set_ylabel(y_label)
        axes.grid(color=SOFT, alpha=0.2, linewidth=0.5)
        axes.legend()

    return draw(paint, name=name, alt=f"{y_label} over the square root of KL", height=3.2)


def _cost(record: Mapping[str, Any]) -> Section:
    rows = [
        [
            NAMES[algorithm],
            round(row["tokens"]),
            round(row["steps"]),
            round(row["seconds"]),
            round(row["cpu_seconds"]),
        ]
        for algorithm, row in record["methods"].items()
    ]
    head = ["", "tokens", "steps", "seconds", "CPU seconds"]
    return Section(
        "cost",
        "Equal tokens",
        "Tokens that one training passes forward and backward through the policy. What comes on "
        "top of them is in the seconds: the passes of PPO's value model over the same tokens, each "
        "rollout's single pass through policy, value model, reference and reward model, the "
        "samples of PPO and of best of n; the reward model itself is trained once before.",
        [table(head, rows)],
    )


def _labels(record: Mapping[str, Any]) -> Section:
    found = record["labels"]
    rows = [
        [
            f"DPO on {name} labels",
            Cell(_estimate(_first(found[key])["win_rate"]), percent=True),
            _estimate(found[key]["gold"]),
            found[key]["kl"],
        ]
        for key, name in (("judge", "the judge's"), ("gold", "the gold check's"))
    ]
    gap = _estimate(found["win_rate_difference"])
    return Section(
        "labels",
        "The judge's labels against gold labels",
        "The same pairs, the same training; only who labelled differs.",
        [
            table(["", "win rate", "gold", "KL"], rows),
            paragraph(f"Difference in win rate, judge less gold: {gap}."),
        ],
    )


def _bias(record: Mapping[str, Any]) -> Section:
    found = record["bias"]
    rows = [
        [
            _LABELS[kind],
            NAMES[algorithm],
            Cell(_estimate(_first(row)["win_rate"]), percent=True),
            _estimate(row.get("length_change")),
            _estimate(row["gold"]),
            _estimate(row.get("gold_change")),
        ]
        for kind, by_algorithm in found["labels"].items()
        for algorithm, row in by_algorithm.items()
    ]
    head = ["labels", "", "win rate", "characters added", "gold", "change of gold"]
    return Section(
        "bias",
        "A judge that likes length",
        f"{found['strength']:g} log-odds per standard deviation of the difference in length were "
        "added to every verdict. Changes are against the same algorithm on the judge's own labels, "
        "by prompt.",
        [
            table(head, rows),
            table(
                ["labels", "figures for which the gate would refuse them"],
                [
                    [_LABELS[kind], ", ".join(names) or "none"]
                    for kind, names in found["refused"].items()
                ],
            ),
        ],
    )
