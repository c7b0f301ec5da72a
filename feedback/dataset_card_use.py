"""The data set card's parts for its users: rows, splits, terms, loading, reproducing, citing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feedback.markdown import code, fence, plain, quote, table
from feedback.provenance import Origin
from feedback.recipe_text import recipe_text

if TYPE_CHECKING:
    from feedback.dataset_card import CardDetails

__all__ = ["COLUMNS", "rows_section", "terms_section", "use_sections"]

Splits = Mapping[str, Mapping[str, int]]

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "preferences": {
        "prompt": ("text or messages", "what the model was asked"),
        "chosen": ("text or messages", "the better completion"),
        "rejected": ("text or messages", "the worse completion"),
        "margin": ("float", "strength of the preference, 2 p_chosen - 1 or a gap of scores"),
        "p_chosen": ("float", "probability that chosen is the better one, 0.5 to 1"),
        "prompt_id": ("text", "names the prompt; splits are by it"),
        "tie": ("bool", "the judge called the two equal; which is chosen then means nothing"),
        "weight": ("float", "weight of the row in a loss"),
        "p_raw": ("float or null", "p_chosen as the judge gave it, before any correction"),
        "source": ("record", "judge, template hash, verdict ids and manifest behind the label"),
    },
    "rankings": {
        "prompt": ("text or messages", "what the model was asked"),
        "completions": ("list of text", "the completions that were ranked"),
        "scores": ("list of float or null", "Bradley-Terry strength in log-odds, or rubric score"),
        "ranking": ("list of lists of int", "tied groups of places in completions, best first"),
        "prompt_id": ("text", "names the prompt; splits are by it"),
        "comparisons": ("list of records i, j, p", "p is the probability that i is better than j"),
        "source": ("record", "judge, template hash, verdict ids and manifest behind the label"),
    },
    "verdicts": {
        "verdict_id": ("text", "names the call"),
        "prompt_id": ("text", "the prompt judged"),
        "kind": ("text", "pairwise, listwise or rating"),
        "shown": ("list of text", "completion ids in the order shown"),
        "outcome": ("text", "decided, tie, unparsed, refused, truncated or failed"),
        "judge": ("record", "model, revision, endpoint, fingerprint of further settings"),
        "template": ("text", "the template's name"),
        "template_sha256": ("text", "the template's hash"),
        "probs": ("list of float or null", "probability of each offered label, renormalised"),
        "mass": ("float or null", "their sum before that"),
        "winner": ("text or null", "completion id of the winner"),
        "ranking": ("list or null", "completion ids, best first (listwise)"),
        "scores": ("list or null", "score of each completion shown (rating)"),
        "rationale": ("text or null", "the judge's reasons, where it was asked for them"),
        "reply": ("text", "the judge's raw text"),
        "sampling": ("record", "how the judge was sampled"),
        "seed": ("int or null", "seed of that"),
        "repeat": ("int", "which repetition of the same question"),
        "usage": ("record", "tokens of the call"),
        "cost": ("float", "US dollars"),
        "latency_s": ("float", "seconds"),
        "attempts": ("int", "requests it took"),
        "cached": ("bool", "the reply came from a cache"),
        "flags": ("list of text", "what a reader must know, such as truncated_prompt"),
        "principle": ("text or null", "principle drawn for this call"),
        "error": ("text or null", "why there is no verdict"),
        "meta": ("record", "fields to slice by"),
    },
    "candidates": {
        "prompt_id": ("text", "names the prompt"),
        "prompt": ("text or messages", "what the model was asked"),
        "completions": ("list of records", "completion, its id, model, sampling, finish reason"),
        "gold": ("text or null", "known-good answer"),
        "meta": ("record", "fields to slice by"),
    },
}
"""Config -> column -> (type, meaning); the columns are the fields of the row types."""


def rows_section(manifests: Sequence[Mapping[str, Any]], splits: Splits) -> str:
    """Return splits with their sizes, counts by kind of row, and the columns of each config."""
    names = list(dict.fromkeys(name for of_config in splits.values() for name in of_config))
    sizes = [
        [code(config), *(f"{of_config[n]:,}" if n in of_config else "" for n in names)]
        for config, of_config in splits.items()
    ]
    parts = [
        "## Rows",
        table(["config", *map(code, names)], sizes),
        "All rows of a prompt are in one split.",
    ]
    counts: Counter[tuple[str, str]] = Counter()
    for manifest in manifests:
        for bucket, count in (manifest.get("counts") or {}).items():
            counts[manifest["kind"], bucket] += count
    if counts:
        rows = [[code(kind), plain(bucket), f"{n:,}"] for (kind, bucket), n in counts.items()]
        parts.append(table(["shards of", "rows that are", "count"], rows))
    for config in splits:
        columns = [[code(name), *words] for name, words in COLUMNS.get(config, {}).items()]
        parts += [f"### Columns of {code(config)}", table(["column", "type", "meaning"], columns)]
    return "\n\n".join(parts)


def terms_section(origins: Sequence[Origin], details: CardDetails) -> str:
    """Return licences, terms, and what was looked for before publishing."""
    parts = ["## Licences and terms", f"Data set: {code(details.license)}."]
    for words, text in (
        ("Prompts:", details.prompt_license),
        ("Terms attached to the judge's outputs:", details.judge_terms),
    ):
        parts.append(f"{words}\n\n{quote(text)}" if text else f"{words} not stated.")
    hosted = {
        str(judge["endpoint"]) for one in origins for judge in one.judges if judge.get("endpoint")
    }
    if hosted:
        parts.append(f"The judge was asked at {', '.join(map(code, sorted(hosted)))}.")
    return "\n\n".join([*parts, "### Looked for before publishing", *_looked_for(details)])


def _looked_for(details: CardDetails) -> Iterator[str]:
    found = details.scan_summary
    if found is None:
        yield "The texts were not scanned for keys or personal data."
    elif not found:
        yield (
            "No key, e-mail address, phone number, IBAN, card number, local path or address with "
            "credentials was found in the texts by pattern and check digit; names and other "
            "personal data were not looked for."
        )
    else:
        rows = [
            [plain(kind), f"{n:,}", "replaced" if kind in details.redacted else "left in, by name"]
            for kind, n in found.items()
        ]
        yield table(["found in the texts", "places", "what was done"], rows)
    overlap = details.overlap_summary
    if overlap is None:
        yield "Overlap with evaluation sets was not looked for."
    elif not overlap:
        yield (
            "No prompt occurs in the evaluation sets that it was held against, neither in full nor "
            "by 13 words in a row."
        )
    else:
        rows = [[code(name), f"{n:,}"] for name, n in overlap.items()]
        yield table(["evaluation set", "prompts that occur in it"], rows)


def use_sections(
    origins: Sequence[Origin], *, repo: str | None, splits: Splits, citation: str | None
) -> list[str]:
    """Return how to load the data set, how to make it again, and how to cite it."""
    return [*_loading(repo, splits), *_reproducing(origins), *_citing(repo, citation)]


def _loading(repo: str | None, splits: Splits) -> Iterator[str]:
    place = repo or "path/to/this/folder"
    config = "preferences" if "preferences" in splits else next(iter(splits))
    split = next(iter(splits[config]), "train")
    load = f'load_dataset({json.dumps(place)}, "{config}", split={json.dumps(split)})'
    yield "## Loading"
    if config == "preferences":
        yield "With TRL:"
        yield fence(
            "from datasets import load_dataset\n"
            "from trl import DPOTrainer\n"
            f'DPOTrainer("MODEL", train_dataset={load}).train()',
            "python",
        )
        yield (
            "TRL takes every row as certain: it reads neither `p_chosen` nor `tie`, and its "
            "RewardTrainer subtracts `margin` from the reward difference."
        )
    else:
        yield fence(f"from datasets import load_dataset\nrows = {load}", "python")
    yield "With this toolkit, which uses the probabilities, ties and weights:"
    train = {"preferences": "dpo", "rankings": "rrhf"}.get(config)
    lines = [f"rlaif import {place} --format published --out data"]
    if train:
        lines.append(f"rlaif {train} --data data/{config}/{split} --model MODEL --output policy")
    yield fence("\n".join(lines), "sh")


def _reproducing(origins: Sequence[Origin]) -> Iterator[str]:
    yield "## Making it again"
    written = False
    for origin in origins:
        text = recipe_text(origin)
        if not text:
            continue
        written = True
        if len(origins) > 1:
            yield f"{plain(origin.name)}:"
        yield "`rlaif run --recipe recipe.toml` with:"
        yield fence(text.rstrip(), "toml")
        if versions := _versions(origin):
            yield f"Made with {versions}."
    if not written:
        yield "The stages that made these rows are not recorded."
    hashes = [
        [plain(origin.name), code(part.get("manifest_sha256", origin.manifest_sha256)), stage]
        for origin in origins
        for stage, part in (("candidates", origin.sampling), ("verdicts", origin.judging))
        if part
    ]
    if hashes:
        yield table(["source", "sha256 of the manifest", "of its"], hashes)


def _versions(origin: Origin) -> str:
    known = {**origin.pairing.get("versions", {}), **origin.judging.get("versions", {})}
    return ", ".join(f"{plain(name)} {plain(version)}" for name, version in known.items())


def _citing(repo: str | None, citation: str | None) -> Iterator[str]:
    yield "## Citation"
    if citation is not None:
        yield fence(citation.strip(), "bibtex" if citation.lstrip().startswith("@") else "text")
        return
    name = repo or "preference-data"
    key = "".join(c if c.isalnum() else "-" for c in name)
    url = f",\n  url = {{https://huggingface.co/datasets/{repo}}}" if repo else ""
    yield fence(f"@misc{{{key},\n  title = {{{name}}}{url}\n}}", "bibtex")
