"""The calibrate command: planted over-confidence is cured on held-out pairs; pair applies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from feedback.calibrate import CalibrateOptions, calibrate
from feedback.calibration import load_calibrations
from feedback.errors import InputError, RecipeError
from feedback.records import GoldPair, JudgeIdentity, Verdict, encode
from feedback.shards import ShardWriter

JUDGE = JudgeIdentity(model="some-judge")


def verdict(number: int, shown: list[str], first: float) -> Verdict:
    return Verdict(
        verdict_id=f"v{number}{shown[0]}",
        prompt_id=f"p{number}",
        kind="pairwise",
        shown=shown,
        outcome="decided",
        probs=[first, 1 - first],
        mass=1.0,
        winner=shown[0] if first > 0.5 else shown[1],
        judge=JUDGE,
        template="pairwise",
        template_sha256="0" * 64,
    )


def recorded(tmp_path: Path, pairs: int, temperature: float, bias: float) -> tuple[Path, Path]:
    """A judge whose logits are ``temperature`` times too large, with a pull to the first slot."""
    rng = np.random.default_rng(0)
    gold = []
    with ShardWriter[Verdict](tmp_path / "verdicts", "verdicts") as writer:
        for number in range(pairs):
            honest = float(rng.normal(0, 1.5))
            label: Any = "a" if rng.random() < special.expit(honest) else "b"
            gold.append(GoldPair(prompt_id=f"p{number}", a="a", b="b", label=label))
            for shown, sign in ((["a", "b"], 1.0), (["b", "a"], -1.0)):
                first = float(special.expit(sign * temperature * honest + bias))
                writer.append(verdict(number, shown, first))
        writer.finish({})
    path = tmp_path / "gold.jsonl"
    path.write_bytes(b"".join(encode(row) + b"\n" for row in gold))
    return tmp_path / "verdicts", path


def test_over_confidence_is_cured_on_pairs_the_fit_has_not_seen(tmp_path: Path) -> None:
    verdicts, gold = recorded(tmp_path, 1000, temperature=3.0, bias=0.6)
    out = tmp_path / "calibration.json"
    (fitted,) = calibrate(CalibrateOptions(verdicts=verdicts, gold=gold, out=out))
    assert fitted.calibration.temperature == pytest.approx(3.0, rel=0.3)
    assert fitted.calibration.bias == pytest.approx(0.6, abs=0.02)
    assert fitted.calibration.pairs + fitted.held_out == 1000
    for name in ("ECE", "Brier", "NLL"):
        before, after = fitted.before[name], fitted.after[name]
        assert after.value is not None and before.value is not None
        assert after.value < before.value
        assert after.low is not None and after.n == fitted.held_out
    assert ("some-judge", "0" * 64) in load_calibrations(out)
    assert json.loads(out.read_text())["report"][0]["held_out_pairs"] == fitted.held_out
    assert "<svg" in out.with_suffix(".html").read_text()
    assert fitted.warning is None


def test_isotonic_is_an_option(tmp_path: Path) -> None:
    verdicts, gold = recorded(tmp_path, 600, temperature=3.0, bias=0.0)
    options = CalibrateOptions(
        verdicts=verdicts, gold=gold, out=tmp_path / "c.json", method="isotonic"
    )
    (fitted,) = calibrate(options)
    assert fitted.after["NLL"].value < fitted.before["NLL"].value  # type: ignore[operator]
    assert fitted.warning is not None and "about 2,000 pairs would do" in fitted.warning


def test_fitting_and_reporting_on_the_same_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="flatter"):
        CalibrateOptions(verdicts=tmp_path, gold=tmp_path, out=tmp_path, held_out=0.0)


def test_too_few_pairs_are_an_error_and_few_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from feedback.calibrate import run

    verdicts, gold = recorded(tmp_path, 40, temperature=2.0, bias=0.0)
    run(CalibrateOptions(verdicts=verdicts, gold=gold, out=tmp_path / "c.json"))
    shown = capsys.readouterr().out
    assert "warning" in shown and "pairs would do" in shown
    assert "pairs would do" in (tmp_path / "c.html").read_text()
    (tmp_path / "none.jsonl").write_bytes(
        encode(GoldPair(prompt_id="other", a="x", b="y", label="a")) + b"\n"
    )
    with pytest.raises(InputError, match="0 pairs have both"):
        calibrate(
            CalibrateOptions(
                verdicts=verdicts, gold=tmp_path / "none.jsonl", out=tmp_path / "d.json"
            )
        )
