"""The data set card's part on how it was made: policy, judge, template, rubric, pairing, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.markdown import code, fence, plain, table
from feedback.provenance import Origin

__all__ = ["making_sections", "public_model"]

_ORDERS = {
    "both": "both: every pair is asked twice, sides swapped, and the label is the mean",
    "one": "one order a pair, drawn by seed",
}
_UNSAID = "Not recorded by the folder that was published."


def public_model(model: object) -> str:
    """Return a model's name as a card may show it: of a local path, only its last part."""
    name = str(model)
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if local else name


def making_sections(origins: Sequence[Origin]) -> list[str]:
    """Return the sections on how the rows were made; a heading for each origin, if several."""
    parts = ["## How it was made"]
    for number, origin in enumerate(origins, start=1):
        if len(origins) > 1:
            parts.append(f"### Source {number}: {plain(origin.name)}")
        parts += [_sampling(origin), _judging(origin), _panel(origin)]
        parts += [_pairing(origin), _cost(origin)]
    parts += list(_templates(origins))
    parts += list(_rubrics(origins))
    return [part for part in parts if part]


def _imported(record: Mapping[str, Any]) -> dict[str, str]:
    """Return where imported rows came from; nothing of rows that this toolkit made."""
    if record.get("stage") != "import" or not record.get("source"):
        return {}
    form = f", read as {code(record['format'])}" if record.get("format") else ""
    revision = f" at {code(record['revision'])}" if record.get("revision") else ""
    return {"imported from": f"{code(record['source'])}{revision}{form}"}


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    """Return a two-column table of what is known; facts that are None are left out."""
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    return f"**{title}**\n\n" + (table(["", ""], rows) if rows else _UNSAID)


def _sampling(origin: Origin) -> str:
    record = origin.sampling
    if not record:
        return f"**Completions**\n\n{_UNSAID}"
    if record.get("stage") == "import":
        return _facts("Completions", _imported(record))
    policies = [_identified(policy[0], next(filter(None, policy[1:]), None))
                for policy in record.get("policies", [])]  # fmt: skip
    facts = {
        "policy": ", ".join(policies) or None,
        "prompts": _number(record.get("prompts")),
        "completions of each": record.get("completions"),
        "temperature": _list(record.get("temperatures")),
        "top p": record.get("top_p"),
        "longest completion, tokens": record.get("max_tokens"),
        "system prompt": code(record["system"]) if record.get("system") else None,
        "repeated completions": record.get("repeats"),
        "seed": record.get("seed"),
        "begun": record.get("started"),
    }
    return _facts("Completions", facts)


def _judging(origin: Origin) -> str:
    record = origin.judging
    if not record:
        return _facts("Labels", _imported(origin.pairing))
    identities = [
        _identified(judge["model"], judge.get("revision"))
        + (f" at {code(judge['endpoint'])}" if judge.get("endpoint") else "")
        for judge in origin.judges
    ]
    template = record.get("template") or {}
    combined = record.get("combine") or {}
    sha256 = f", sha256 {code(template['sha256'])}" if template.get("sha256") else ""
    asked = f"{template['kind']} verdicts, {template['mode']} mode" if "kind" in template else None
    facts: dict[str, Any] = {
        **_imported(record),
        "judge" if len(identities) < 2 else "judges": ", ".join(identities) or None,
        "judges combined by": combined.get("rule"),
        "template": code(template["name"]) + sha256 if template else None,
        "asked for": asked,
        "labels offered": ", ".join(map(code, record.get("choices", []))) or None,
        "orders": _ORDERS.get(str(record.get("orders")), record.get("orders")),
        "pairs of a prompt": record.get("pairs"),
        "times each question was asked": record.get("repeats"),
        "sampling": _list(f"{k} {v}" for k, v in (record.get("sampling") or {}).items()),
        "least mass on the labels": record.get("min_mass"),
        "constitution": _constitution(record.get("constitution")),
        "seed": record.get("seed"),
        "begun": record.get("started"),
    }
    return _facts("Verdicts", facts)


def _panel(origin: Origin) -> str:
    """Return what each of several judges did, and how far they agree."""
    report = origin.judging.get("panel")
    if not report or len(origin.judges) != len(report["calls"]):
        return ""
    names = [code(public_model(judge["model"])) for judge in origin.judges]
    rows = [
        [name, f"{calls:,}", f"${cost:,.2f}" if cost else "", *map(_share, agreement)]
        for name, calls, cost, agreement in zip(
            names, report["calls"], report["cost"], report["agreement"], strict=True
        )
    ]
    worth = report.get("effective_judges")
    parts = [
        "**The judges**",
        table(["judge", "calls", "cost", *(f"agrees with {name}" for name in names)], rows),
        f"Agreement is the share of {plain(report.get('of', 'pairs'))} on which two judges say "
        "the same." + (f" Together they are worth {worth:g} independent judges." if worth else ""),
    ]
    return "\n\n".join(parts)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _pairing(origin: Origin) -> str:
    recipe = origin.pairing.get("recipe") or {}
    if not recipe or origin.pairing.get("stage") != "pair":
        return ""
    remedy = (origin.pairing.get("remedy") or {}).get("name")
    facts = {
        "pairs taken": recipe.get("pairs"),
        "labels": recipe.get("labels"),
        "ties": recipe.get("ties"),
        "near ties": f"{recipe.get('near_ties')}, within {recipe.get('band')} of one half"
        if recipe.get("band")
        else None,
        "pairs whose orders disagree": recipe.get("inconsistent"),
        "calibration": code(origin.pairing["calibration_sha256"])
        if origin.pairing.get("calibration_sha256")
        else None,
        "correction": remedy if remedy not in (None, "none") else None,
    }
    return _facts("Pairs", facts)


def _cost(origin: Origin) -> str:
    """Return what the judging took, in one sentence."""
    totals = origin.judging.get("totals")
    if not totals:
        return ""
    calls = int(origin.judging.get("rows", 0)) + int(origin.judging.get("failed", 0))
    price = f"cost ${totals['cost']:,.2f}" if totals["cost"] else "has no price attached"
    return (
        f"The judging took {calls:,} calls ({totals['from_cache']:,.0f} answered from a cache), "
        f"{totals['prompt_tokens']:,.0f} prompt tokens ({totals['cached_tokens']:,.0f} of them "
        f"from the prefix cache) and {totals['completion_tokens']:,.0f} reply tokens, and "
        f"{price}."
    )


def _templates(origins: Sequence[Origin]) -> Iterator[str]:
    """Yield each template in full, once, with its hash."""
    known = {one["sha256"]: one for origin in origins for one in origin.templates}
    named = {
        one["sha256"]: one
        for origin in origins
        if (one := origin.judging.get("template")) and one.get("sha256")
    }
    if known or named:
        yield "### Judge template, in full"
    for template in known.values():
        tie = f"; tie {code(template['tie'])}" if template.get("tie") else ""
        labels = ", ".join(map(code, template["labels"]))
        parts = [
            f"{code(template['name'])}, sha256 {code(template['sha256'])}; labels {labels}{tie}."
        ]
        if template["system"]:
            parts += ["System turn:", fence(template["system"].strip())]
        yield "\n\n".join([*parts, "User turn:", fence(template["user"].strip())])
    for sha256, template in named.items():
        if sha256 not in known:
            yield (
                f"{code(template['name'])}, sha256 {code(sha256)}: its text was not kept by the "
                "folder that was published."
            )


def _rubrics(origins: Sequence[Origin]) -> Iterator[str]:
    rubrics = dict.fromkeys(
        str(origin.judging["rubric"]) for origin in origins if origin.judging.get("rubric")
    )
    if rubrics:
        yield "### Rubric"
    for rubric in rubrics:
        yield fence(rubric.strip())
    weights = {
        k: v for origin in origins for k, v in (origin.judging.get("criteria") or {}).items()
    }
    if weights:
        yield table(["criterion", "weight"], [[code(k), f"{v:g}"] for k, v in weights.items()])


def _constitution(record: Mapping[str, Any] | None) -> str | None:
    if not record:
        return None
    return f"{code(record.get('name'))}, sha256 {code(record.get('sha256'))}"


def _identified(model: object, revision: object) -> str:
    return code(public_model(model)) + (f" (revision {code(revision)})" if revision else "")


def _list(values: Any) -> str | None:
    return ", ".join(map(str, values)) or None if values is not None else None


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None
