"""The revise stage in a chain: what comes after it reads the revisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedback.records import Candidates
from feedback.shards import manifest_sha256, read_manifest, read_rows
from train import pipeline
from train.config import SftOptions
from train.documents import read_documents
from train.models import load_tokenizer
from train.pipeline import PipelineOptions

RECIPE = """
[run]
folder = "{folder}"
stages = ["sample", "revise", "judge", "report", "pair"]
[sample]
prompts = "booking-train"
limit = 4
completions = 2
max_tokens = 24
engine = {{ model = "pocket:policy", backend = "transformers" }}
[revise]
constitution = "helpful-honest"
max_tokens = 24
critique_tokens = 8
engine = {{ model = "pocket:policy", backend = "transformers" }}
[judge]
rubric = "booking"
engine = {{ model = "pocket:judge", backend = "transformers" }}
[report]
thresholds = {{ min_pairs = 1, min_order_consistency = 0, min_mass = 0 }}
replicates = 50
[pair]
accept-bias = ["position_bias", "length_bias"]
"""


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineOptions:
    """A recipe whose stages run in this process: the same code without five imports of torch."""

    def run_here(stage: str, table: dict[str, object], folder: Path) -> float:
        folder.mkdir(parents=True, exist_ok=True)
        options = folder / f"{stage}-options.json"
        options.write_text(json.dumps(table))
        assert pipeline._stage_main(stage, options) == 0
        return 0.0

    monkeypatch.setattr(pipeline, "_run_stage", run_here)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "run"))
    stages = ("sample", "revise", "judge", "report", "pair")
    return PipelineOptions(folder=tmp_path / "run", stages=stages, recipe=str(recipe))


def test_a_recipe_revises_and_judges_the_revisions(
    chain: PipelineOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(chain)
    folder = chain.folder
    revised = list(read_rows(folder / "revised", Candidates))
    origins = {row.prompt_id: row for row in read_rows(folder / "candidates", Candidates)}
    new = [
        entry
        for row in revised
        for entry in row.completions
        if entry not in origins[row.prompt_id].completions
    ]
    assert new and all("revised_from" in entry.sampling for entry in new)
    judged = read_manifest(folder / "verdicts")
    assert judged["candidates_sha256"] == manifest_sha256(folder / "revised")
    assert read_manifest(folder / "preferences")["rows"] > 0
    card = json.loads((folder / "report-card" / "report.json").read_text())
    assert card["source"]["candidates"] == str(folder / "revised")
    capsys.readouterr()
    pipeline.run(chain)
    assert capsys.readouterr().out.count("unchanged, skipped") == 5


def test_stages_before_the_revision_keep_their_wiring(chain: PipelineOptions) -> None:
    recipe = {"sft": {"model": "pocket:policy"}}
    tables = {
        stage: pipeline._resolve(stage, recipe, chain, revised=True)
        for stage in ("judge", "pair", "report", "sft")
    }
    revised = str(chain.folder / "revised")
    assert [tables[stage]["candidates"] for stage in ("judge", "pair", "report")] == [revised] * 3
    assert tables["sft"]["data"] == [revised]
    assert tables["sft"]["output"] == str(chain.folder / "policy-sft")
    plain = pipeline._resolve("judge", {}, chain)
    assert plain["candidates"] == str(chain.folder / "candidates")
    assert pipeline._resolve("revise", {}, chain)["out"] == revised


def test_revisions_are_documents_for_supervised_training(tmp_path: Path) -> None:
    rows = [
        {
            "prompt_id": "p",
            "prompt": "Ask.",
            "completions": [{"completion_id": name, "completion": name} for name in ("one", "two")],
        }
    ]
    path = tmp_path / "candidates-00000.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = load_tokenizer(SftOptions(data=(), output=tmp_path, model="pocket:policy"))
    groups, report = read_documents([tmp_path], tokenizer, max_length=128)
    assert report.rows == 1 and len(groups) == 2
    assert not report.warnings
    assert [group.prompt_id for group in groups] == ["p", "p"]
    assert groups[0].prompt_ids.tolist() == groups[1].prompt_ids.tolist()
