"""The data set card: true to the manifests, valid for the Hub, safe against the texts it shows."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from scripted import Scripted, write_candidates

from feedback import labeling, pairing
from feedback.bias_words import bias_sentences, unmeasured
from feedback.config import EngineOptions, build_options
from feedback.dataset_card import CONFIGS, CardDetails, dataset_card
from feedback.dataset_card_use import COLUMNS
from feedback.errors import InputError
from feedback.hub_metadata import LICENSES, size_category
from feedback.intervals import Estimate
from feedback.labeling import JudgeOptions
from feedback.markdown import code, fence, plain, table
from feedback.merge import MergeOptions, merge
from feedback.pairing import PairOptions
from feedback.panel import PanelJudge, PanelOptions
from feedback.records import Candidates, Preference, Ranking, Verdict
from feedback.report import ReportOptions
from feedback.report import run as run_report
from feedback.shards import ShardWriter
from feedback.simulation import Planted, simulate

HOSTILE = "</details><script>alert(1)</script> ```` [x](http://evil) | **bold** {prompt}"
DETAILS = CardDetails(license="cc-by-4.0", language=("en",))
SPLITS = {"preferences": {"train": 70, "test": 20}, "rankings": {"train": 30}}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: candidates, verdicts, report card, preferences, rankings."""
    with pytest.MonkeyPatch.context() as patch:
        return make_run(tmp_path_factory.mktemp("run"), patch)


def make_run(folder: Path, patch: pytest.MonkeyPatch, name: str = "vendor/judge") -> Path:
    folder.mkdir(exist_ok=True)
    template = folder / "hostile.toml"
    template.write_text(
        'name = "hostile"\nkind = "pairwise"\nlabels = ["A", "B"]\nuser = """\n'
        f"{HOSTILE}\n{{rubric}}\n<reply_a>\n{{completion_a}}\n</reply_a>\n<reply_b>\n"
        '{completion_b}\n</reply_b>\n"""\n'
    )
    patch.setattr(labeling, "open_backend", lambda options: Scripted(name, mass=0.99))
    values = {f"p{n}": [0.0, 1.0, 2.5] for n in range(30)}
    write_candidates(folder / "candidates.jsonl", values)
    labeling.run(
        JudgeOptions(
            candidates=folder / "candidates.jsonl",
            out=folder / "verdicts",
            template=str(template),
            engine=EngineOptions(model=name),
        )
    )
    run_report(ReportOptions(verdicts=folder / "verdicts", replicates=200))
    pairing.run(
        PairOptions(
            verdicts=folder / "verdicts", candidates=folder / "candidates.jsonl", out=folder
        )
    )
    return folder


def card_of(folder: Path, **changes: Any) -> str:
    details = dataclasses.replace(DETAILS, **changes)
    folders = [folder / "preferences", folder / "rankings"]
    return dataset_card(folders, repo="user/set", splits=SPLITS, details=details)


def header_of(text: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(text.split("---\n")[1])


def test_the_header_is_what_the_hub_validates(judged: Path) -> None:
    from huggingface_hub import DatasetCard

    text = card_of(judged, tags=("booking",))
    card = DatasetCard(text)
    data = card.data.to_dict()
    assert data == header_of(text)
    assert data["license"] in LICENSES and data["language"] == ["en"]
    assert data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["text-generation", "text-ranking"]
    assert data["tags"][-1] == "booking"
    preferences, rankings = data["configs"]
    assert preferences["default"] and preferences["data_files"] == [
        {"split": "train", "path": "preferences/train-*.parquet"},
        {"split": "test", "path": "preferences/test-*.parquet"},
    ]
    assert rankings["config_name"] == "rankings"


@pytest.mark.parametrize(
    ("rows", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**9, "1B<n<10B")]
)
def test_sizes_are_the_hubs_classes(rows: int, name: str) -> None:
    assert size_category(rows) == name


def test_what_the_hub_refuses_is_refused_with_the_nearest(judged: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'cc-by-4\\.0'"):
        card_of(judged, license="cc-by-4")
    with pytest.raises(InputError, match="'English' is not an ISO 639 code"):
        card_of(judged, language=("English",))


def test_the_published_tree_loads_by_the_cards_configs(judged: Path, tmp_path: Path) -> None:
    from datasets import Dataset, load_dataset

    (tmp_path / "README.md").write_text(card_of(judged))
    for config, splits in SPLITS.items():
        for split, rows in splits.items():
            path = tmp_path / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_list([{"prompt": "q", "n": n} for n in range(rows)]).to_parquet(path)
    loaded = load_dataset(str(tmp_path), "rankings", cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == SPLITS["rankings"]
    default = load_dataset(str(tmp_path), split="test", cache_dir=str(tmp_path / "cache"))
    assert len(default) == SPLITS["preferences"]["test"]


def test_the_card_says_how_the_rows_were_made(judged: Path) -> None:
    text = card_of(judged)
    assert "labelled by `vendor/judge`" in text
    manifest = (judged / "verdicts" / "manifest.json").read_text()
    template = json.loads(manifest)["templates"][0]
    assert template["sha256"] in text and template["user"].strip() in text
    assert "both: every pair is asked twice" in text
    assert "180 calls" in text and "18,000 prompt tokens" in text
    assert "| `preferences` | 70 | 20 |" in text
    assert "| decided | 180 | 100.0% |" in text
    assert "Same verdict in both orders" in text and "95% interval" in text
    for name in COLUMNS["preferences"]:
        assert f"| `{name}` |" in text
    assert str(judged) not in text, "a local path left with the card"


def test_hostile_texts_stay_texts(judged: Path) -> None:
    text = card_of(judged, judge_terms=HOSTILE, citation=HOSTILE, prompt_license=HOSTILE)
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or []]
    assert not [token for token in (*tokens, *inline) if token.type.startswith("html")]
    assert not [token for token in inline if token.type in ("link_open", "image", "strong_open")
                and "evil" in str(token.attrs)]  # fmt: skip
    fenced = [token.content for token in tokens if token.type == "fence"]
    assert any(HOSTILE in content and "<reply_a>" in content for content in fenced)
    shown = "".join(child.content for child in inline if child.type == "text")
    assert "**bold**" in shown and "<script>" in shown.replace("&lt;", "<").replace("&gt;", ">")


def test_pieces_of_markdown_cannot_be_left() -> None:
    assert fence("a\n```\nb").startswith("````text\n")
    assert code("a`b") == "``a`b``"
    assert plain("a|b<c>*d*") == r"a\|b&lt;c&gt;\*d\*"
    assert plain("- x\n1. y") == "\\- x\n1\\. y"
    lines = table(["x"], [["a|b"], ["`c\\|d`"]]).split("\n")
    assert lines[2:] == [r"| a\|b |", r"| `c\|d` |"]


def test_the_recipe_in_the_card_is_one(judged: Path) -> None:
    text = card_of(judged)
    recipe = tomllib.loads(text.split("```toml\n")[1].split("\n```")[0])
    assert recipe["run"]["stages"] == ["judge", "report", "pair"]
    assert recipe["judge"] == {"engine": {"model": "vendor/judge"}, "template": "hostile.toml"}
    table = recipe["judge"] | {"candidates": "c", "out": "o", "template": "pairwise"}
    build_options(JudgeOptions, table)


def test_unknown_origins_are_said_to_be_unknown(tmp_path: Path) -> None:
    with ShardWriter[Preference](tmp_path / "preferences", "preferences") as writer:
        writer.append(
            Preference(
                prompt="q", chosen="a", rejected="b", margin=1.0, p_chosen=1.0, prompt_id="p"
            )
        )
        writer.finish({})
    text = dataset_card(
        [tmp_path / "preferences"], repo=None, splits={"preferences": {"train": 1}}, details=DETAILS
    )
    assert "labels made elsewhere" in text
    assert "nothing was measured" in text
    assert "not scanned" in text and "not looked for" in text


def test_what_was_found_before_publishing_is_said(judged: Path) -> None:
    text = card_of(
        judged,
        scan_summary={"email": 3, "phone": 1},
        redacted=("email",),
        overlap_summary={"gsm8k": 2},
        judge_terms="May not be used to compete.",
        accepted_bias=("length_bias",),
    )
    assert "| email | 3 | replaced |" in text
    assert "| phone | 1 | left in, by name |" in text
    assert "| `gsm8k` | 2 |" in text
    assert "> May not be used to compete." in text
    assert "accepted by name all the same: `length_bias`" in text


def test_a_merged_set_shows_every_source(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_run(tmp_path / "other", monkeypatch, "second/judge")
    for kind in ("preferences",):
        merge(MergeOptions(sources=(judged / kind, other / kind), out=tmp_path / "all" / kind))
    text = dataset_card(
        [tmp_path / "all" / "preferences"],
        repo="user/set",
        splits={"preferences": {"train": 90}},
        details=DETAILS,
    )
    assert "`vendor/judge`, `second/judge`" in text
    assert text.count("### Source ") == 2
    assert text.count("User turn:") == 1, "one template, shown once"
    assert text.count("position_bias.order_consistency") >= 2


def test_the_splits_of_a_merge_are_one_source(judged: Path, tmp_path: Path) -> None:
    splits = {"train": 0.5, "test": 0.5}
    merge(MergeOptions(sources=(judged / "preferences",), out=tmp_path, splits=splits))
    folders = [tmp_path / "train", tmp_path / "test"]
    sizes = {"preferences": {"train": 45, "test": 45}}
    text = dataset_card(folders, repo="user/set", splits=sizes, details=DETAILS)
    assert "### Source" not in text
    assert "| `preferences` | decided | 90 |" in text


def test_all_folders_of_a_run_are_one_source(judged: Path) -> None:
    kinds = ("preferences", "rankings", "verdicts")
    splits = {kind: {"train": 1} for kind in kinds}
    folders = [judged / kind for kind in kinds]
    text = dataset_card(folders, repo="user/set", splits=splits, details=DETAILS)
    assert "### Source" not in text
    assert text.count("### Known biases") == 1 and text.count("**Verdicts**") == 1


def test_a_panel_is_shown_judge_by_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judges = {name: Scripted(name, mass=0.99) for name in ("first", "second")}
    monkeypatch.setattr(labeling, "open_backend", lambda options: judges[options.model])
    write_candidates(tmp_path / "candidates.jsonl", {f"p{n}": [0.0, 1.0, 2.5] for n in range(9)})
    panel = PanelOptions(judges=(PanelJudge(engine=EngineOptions(model="second")),))
    labeling.run(
        JudgeOptions(
            candidates=tmp_path / "candidates.jsonl",
            out=tmp_path / "verdicts",
            engine=EngineOptions(model="first"),
            panel=panel,
        )
    )
    folder = tmp_path / "verdicts"
    text = dataset_card([folder], repo=None, splits={"verdicts": {"train": 1}}, details=DETAILS)
    assert "| judges | `first`, `second` |" in text
    assert "| judge | calls | cost | agrees with `first` | agrees with `second` |" in text
    assert "| `second` | 54 |  | 100.0% | 100.0% |" in text


@pytest.fixture(scope="module")
def leaning(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The card of a judge that is pulled to the first place and to length, with gold and people."""
    folder = tmp_path_factory.mktemp("leaning")
    planted = Planted(sensitivity=1.5, position=1.5, length=1.5, soft=True, votes=5)
    simulated = simulate(planted, prompts=150)
    with ShardWriter[Candidates](folder / "candidates", "candidates") as writer:
        for name, known in simulated.material.prompts.items():
            completions = list(known.completions.values())
            writer.append(Candidates(prompt_id=name, prompt=known.prompt, completions=completions))
        writer.finish({})
    with ShardWriter[Any](folder / "gold", "gold") as golds:
        for pair in simulated.gold.values():
            golds.append(pair)
        golds.finish({})
    with ShardWriter[Verdict](folder / "verdicts", "verdicts") as verdicts:
        for verdict in simulated.verdicts:
            verdicts.append(verdict)
        judge = {"model": simulated.verdicts[0].judge.model}
        info = {"orders": "both", "judge": judge, "template": {"name": "t", "sha256": "s"}}
        verdicts.finish(info, count=lambda row: row.outcome)
    run_report(ReportOptions(verdicts=folder / "verdicts", replicates=300))
    return dataset_card(
        [folder / "verdicts"], repo="u/v", splits={"verdicts": {"train": 1}}, details=DETAILS
    )


def test_planted_biases_are_named(leaning: str) -> None:
    biases = leaning.split("### Known biases")[1].split("###")[0]
    assert "leans towards the reply shown first" in biases
    assert "prefers the longer reply more often than gold does" in biases
    assert "agrees with gold more often than chance" in biases
    assert "than one more person would" in biases
    assert "#### Agreement with gold" in leaning
    assert "One person against the rest" in leaning
    assert "its text was not kept" in leaning


def test_no_bias_is_claimed_where_the_interval_holds_the_fair_value() -> None:
    def figure(value: float, low: float | None, high: float | None) -> Estimate:
        return Estimate(value, low, high, 50, 50, "")

    name = "position_bias.preference_fairness"
    (none,) = bias_sentences({name: figure(-0.2, -0.5, 0.1)})
    assert "no lean" in none and "-0.500 to 0.100" in none
    (some,) = bias_sentences({name: figure(-0.2, -0.3, -0.1)})
    assert "leans towards the reply shown first" in some
    (bare,) = bias_sentences({name: figure(-0.2, None, None)})
    assert "no lean" in bare
    assert "position bias" not in unmeasured({name: figure(0, 0, 0)})
    assert len(unmeasured({})) == 7


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("preferences", Preference),
        ("rankings", Ranking),
        ("verdicts", Verdict),
        ("candidates", Candidates),
    ],
)
def test_every_column_is_explained(config: str, kind: type[Any]) -> None:
    assert config in CONFIGS
    assert set(COLUMNS[config]) == {entry.name for entry in dataclasses.fields(kind)}
