"""Verdicts to training rows: preferences and rankings, each traceable to the calls behind it.

A label is only as certain as its judge: the mean of both orders goes into ``p_chosen`` as it is,
ties stay ties, and a pair with a failed, refused or unreadable verdict yields no row. What was left
out is counted in the manifest.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from feedback.calibration import apply, load_calibrations
from feedback.comparing import prompt_comparisons
from feedback.config import recipe_of
from feedback.errors import InputError, ShardError
from feedback.gate import check_gate
from feedback.inputs import checked_candidates
from feedback.ordering import Orders
from feedback.pairing import PairOptions
from feedback.panel import Combination
from feedback.preference_rows import PairRules, preference_rows, ranking_row, usable
from feedback.progress import ProgressBar, say
from feedback.provenance import judging_record, sampling_record
from feedback.records import Candidates, Comparison
from feedback.remedy import load_remedy
from feedback.shards import (
    MANIFEST,
    ShardWriter,
    file_sha256,
    manifest_sha256,
    read_manifest,
    shard_paths,
)
from feedback.verdict_index import VerdictIndex

__all__ = ["pair"]


def pair(options: PairOptions) -> None:
    """Write the preferences and rankings of a verdict folder.

    Raises:
        InputError: verdicts and candidates do not belong together, or one of them is unfinished.
        GateRefused: the judge's report card fails a threshold.
    """
    manifest = read_manifest(options.verdicts)
    if manifest["kind"] != "verdicts":
        raise ShardError(f"holds {manifest['kind']}, not verdicts", path=options.verdicts)
    gate = _check_gate(options)
    prompts, rules = _survey(options)
    calibrate = _calibration(options, manifest)
    remedy = load_remedy(options.remedy, options.verdicts, options.candidates)
    source = {
        "judge": manifest.get("judge", {}).get("model"),
        "template_sha256": manifest.get("template", {}).get("sha256"),
        "manifest_sha256": manifest_sha256(options.verdicts),
    }
    orders: Orders = manifest.get("orders", "both")
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        index = stack.enter_context(VerdictIndex(options.verdicts, failed=True))
        preferences = stack.enter_context(_fresh_writer(options.out, "preferences"))
        rankings = stack.enter_context(_fresh_writer(options.out, "rankings"))
        bar = stack.enter_context(ProgressBar("pairing", prompts))
        read = 0
        combination = Combination.read(manifest.get("combine"))
        for row in checked_candidates(options.candidates):
            verdicts = index.verdicts(row.prompt_id)
            read += len(verdicts)
            found = prompt_comparisons(
                verdicts,
                orders=orders,
                weights=manifest.get("criteria"),
                combination=combination,
            )
            _check_known(row, found, options)
            completions = {entry.completion_id: entry for entry in row.completions}
            stated = remedy.apply(found, calibrate(found))
            labelled = usable(found, completions, stated, counts)
            ranking = ranking_row(
                row,
                labelled,
                rules,
                source=source,
                verdicts=verdicts,
                weights=manifest.get("criteria"),
                combination=combination,
            )
            for preference in preference_rows(
                row, labelled, rules, ranking=ranking, source=source, counts=counts
            ):
                preferences.append(preference)
            if ranking is not None:
                rankings.append(ranking)
            bar.advance()
        if read < index.rows:
            raise InputError(
                f"{index.rows - read} verdicts are about prompts that are not in "
                f"{options.candidates}; give the candidates that were judged",
                path=options.verdicts,
            )
        record = {"gate": gate, "remedy": remedy.record}
        info = {**_manifest(options, manifest, source, counts), **record}
        preferences.finish(info, count=lambda row: "tie" if row.tie else "decided")
        rankings.finish(info)
    _say_outcome(options, counts)


def _survey(options: PairOptions) -> tuple[int, PairRules]:
    """Count the prompts, and settle the form of the rows."""
    number = chat = 0
    for row in checked_candidates(options.candidates):
        number += 1
        chat += not isinstance(row.prompt, str)
    if options.prompts == "text" and chat:
        raise InputError(
            f"{chat} prompts are chat messages, which --prompts text cannot hold; use messages",
            path=options.candidates,
        )
    rules = PairRules(
        pairs=options.pairs,
        labels=options.labels,
        ties=options.ties,
        near_ties=options.near_ties,
        band=options.band,
        inconsistent=options.inconsistent,
        most=options.pairs_per_prompt,
        messages=options.prompts == "messages" or (options.prompts == "auto" and chat > 0),
        seed=options.seed,
    )
    return number, rules


def _fresh_writer(out: Path, kind: str) -> ShardWriter[Any]:
    """Return a writer of an empty folder: pairing takes seconds and starts over each time."""
    folder = out / kind
    writer = ShardWriter[Any](folder, kind)
    writer.close()
    for path in shard_paths(folder, kind):
        path.unlink()
    return ShardWriter[Any](folder, kind)


def _check_known(row: Candidates, found: Sequence[Comparison], options: PairOptions) -> None:
    known = {entry.completion_id for entry in row.completions}
    for comparison in found:
        for name in (comparison.a, comparison.b):
            if name not in known:
                raise InputError(
                    f"prompt {row.prompt_id!r} has no completion {name!r}, which the verdicts in "
                    f"{options.verdicts} speak of; give the candidates that were judged",
                    path=options.candidates,
                )


Calibrate = Callable[[Sequence[Comparison]], Mapping[tuple[str, str], float]]


def _calibration(options: PairOptions, manifest: Mapping[str, Any]) -> Calibrate:
    """Return what maps comparisons to calibrated probabilities, by (a, b)."""
    if options.calibration is None:
        return lambda _: {}
    if manifest.get("combine") is not None:
        raise InputError(
            "a calibration is of one judge, and these verdicts are of several; pair without it",
            path=options.verdicts,
        )
    maps = load_calibrations(options.calibration)
    key = (manifest["judge"]["model"], manifest["template"]["sha256"])
    if key not in maps:
        known = ", ".join(f"{model} with template {sha[:12]}" for model, sha in maps)
        raise InputError(
            f"holds no map for {key[0]} with template {key[1][:12]} (it holds: {known}); "
            "calibrate this judge with this template",
            path=options.calibration,
        )

    def calibrate(rows: Sequence[Comparison]) -> dict[tuple[str, str], float]:
        known = [row for row in rows if row.p is not None]
        stated = [[math.nan if p is None else p for p in row.p_orders] for row in known]
        values = apply(maps[key], stated) if known else ()
        return {(row.a, row.b): float(p) for row, p in zip(known, values, strict=True)}

    return calibrate


def _check_gate(options: PairOptions) -> dict[str, Any]:
    """Return the gate's record for the manifests."""
    result = check_gate(options.verdicts, accept=options.accept_bias, candidates=options.candidates)
    return result.manifest()


def _manifest(
    options: PairOptions, manifest: dict[str, Any], source: dict[str, Any], counts: Counter[str]
) -> dict[str, Any]:
    return {
        "stage": "pair",
        "judge": manifest.get("judge"),
        "template": manifest.get("template"),
        "orders": manifest.get("orders"),
        "verdicts_manifest_sha256": source["manifest_sha256"],
        "comparisons": dict(counts),
        "calibration_sha256": options.calibration and file_sha256(options.calibration),
        "recipe": recipe_of(options),
        "provenance": {
            "judging": judging_record(options.verdicts),
            "sampling": sampling_record(options.candidates),
        },
    }


def _say_outcome(options: PairOptions, counts: Counter[str]) -> None:
    kept = counts["preferences kept"] + counts["ties kept"]
    left = ", ".join(
        f"{name} {number}" for name, number in counts.most_common() if not name.endswith("kept")
    )
    say(
        f"{kept} preferences ({counts['ties kept']} of them ties) in {options.out / 'preferences'}"
        + (f"; left out: {left}" if left else "")
    )
    if not kept:
        raise InputError(
            "no comparison holds a label: look at the outcomes of the verdicts",
            path=options.verdicts / MANIFEST,
        )
