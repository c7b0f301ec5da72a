"""Pairing with remedies: the judge's pull of length taken out, annotators weighed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_gate import leave

from feedback.errors import InputError
from feedback.observations import load_material
from feedback.pairing import PairOptions, run
from feedback.records import Preference
from feedback.remedy import load_remedy
from feedback.shards import read_manifest, read_rows
from feedback.simulation import Planted, simulate


def paired(folder: Path, name: str, remedy: str) -> list[Preference]:
    run(
        PairOptions(
            verdicts=folder / "verdicts",
            candidates=folder / "candidates",
            out=folder / name,
            accept_bias=("position_bias",),
            remedy=remedy,  # type: ignore[arg-type]
        )
    )
    return list(read_rows(folder / name / "preferences", Preference))


def length(text: object) -> int:
    return len(str(text))


def test_length_corrected_labels(tmp_path: Path) -> None:
    """The longer one is chosen less often, the judge's own probability stays beside the new one."""
    leave(simulate(Planted(length=1.2, soft=True, lean=0.1), prompts=120, seed=3), tmp_path)
    before = paired(tmp_path, "plain", "none")
    after = paired(tmp_path, "corrected", "length")

    def longer(rows: list[Preference]) -> float:
        return sum(length(row.chosen) > length(row.rejected) for row in rows) / len(rows)

    assert len(before) == len(after)
    assert longer(before) > 0.58
    assert longer(after) < longer(before) - 0.04
    raw = {row.p_raw for row in after}
    assert None not in raw
    assert any(abs((row.p_raw or 0) - row.p_chosen) > 0.05 for row in after)
    record = read_manifest(tmp_path / "corrected/preferences")["remedy"]
    assert record["name"] == "length"
    assert record["coefficient"] == pytest.approx(1.2, abs=0.3)
    assert record["at_equal"] == ["gold", "models"]
    assert read_manifest(tmp_path / "plain/preferences")["remedy"] == {"name": "none"}


def test_annotator_labels_agree_more_with_gold(tmp_path: Path) -> None:
    """A judge that leans to the first place: the two orders are weighed as two annotators."""
    simulated = simulate(Planted(position=1.5, sensitivity=2.5, lean=0.1), prompts=150, seed=4)
    leave(simulated, tmp_path)
    rows = paired(tmp_path, "weighed", "annotators")
    material = load_material([tmp_path / "candidates"])
    texts = {
        (name, side.completion): key
        for name, known in material.prompts.items()
        for key, side in known.completions.items()
    }
    right = []
    for row in rows:
        a, b = (texts[row.prompt_id, str(text)] for text in (row.chosen, row.rejected))
        gold = simulated.gold[row.prompt_id, min(a, b), max(a, b)]
        right.append(gold.a == a if gold.label == "a" else gold.b == a)
    assert sum(right) / len(right) > 0.7
    record = read_manifest(tmp_path / "weighed/preferences")["remedy"]
    assert len(record["confusion"]) == 2
    assert 0.5 <= min(row.p_chosen for row in rows) <= max(row.p_chosen for row in rows) <= 1


def test_remedies_that_cannot_be_fitted_say_why(tmp_path: Path) -> None:
    one, other = (
        simulate(Planted(soft=True), prompts=5, judge=name, seed=1) for name in ("one", "other")
    )
    leave(one, tmp_path / "several")
    from feedback.records import Verdict
    from feedback.shards import ShardWriter

    with ShardWriter[Verdict](tmp_path / "several/verdicts", "verdicts") as writer:
        for verdict in other.verdicts:
            writer.append(verdict)
        writer.finish({})
    with pytest.raises(InputError, match="these verdicts are of several"):
        load_remedy("length", tmp_path / "several/verdicts", tmp_path / "several/candidates")
    silent = simulate(Planted(unparsed=1.0), prompts=5)
    leave(silent, tmp_path / "silent")
    for name, message in (("length", "cannot be fitted"), ("annotators", "no pairwise verdict")):
        with pytest.raises(InputError, match=message):
            load_remedy(name, tmp_path / "silent/verdicts", tmp_path / "silent/candidates")  # type: ignore[arg-type]
