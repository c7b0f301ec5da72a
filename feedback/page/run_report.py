"""The report of a run: what was asked, what was judged, what was learnt, and what came of it.

Shows whichever stages the run's folder holds; a stage that did not run is simply absent. Everything
comes from the files of the run; no model is loaded and nothing is fetched.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from feedback.errors import InputError
from feedback.page.components import Section, note, table
from feedback.page.run_evaluation import load_json, result_sections
from feedback.page.run_labels import label_sections, training_sections
from feedback.page.shell import render_page
from feedback.shards import MANIFEST, write_text

__all__ = ["write_run_report"]


def write_run_report(
    run_folder: Path, *, out: Path | None = None, examples: int = 3, browse_rows: int = 10_000
) -> Path:
    """Write the report of a run's folder and return its path.

    Args:
        run_folder: holds candidates, verdicts, preferences, trained models, evaluation, as far as
            they were made.
        out: file to write; None: ``report.html`` in the folder.
        examples: pairs to show in full, of the labels and of the evaluation.
        browse_rows: most pairs in the browsable table; 0: no table.

    Raises:
        InputError: the folder is missing or holds nothing that can be shown.
    """
    if not run_folder.is_dir():
        raise InputError("no such folder", path=run_folder)
    sections = [
        *result_sections(run_folder, examples),
        *_judge_sections(run_folder),
        *label_sections(run_folder, examples),
        *training_sections(run_folder),
        *_browser_sections(run_folder, browse_rows),
        *_provenance(run_folder),
    ]
    if not sections:
        raise InputError("holds no finished stage of a run", path=run_folder)
    path = out or run_folder / "report.html"
    page = render_page(
        title=f"Run {run_folder.resolve().name}",
        kicker="AI feedback, one run",
        subtitle="From prompts to a policy: candidates, verdicts, labels, training, and the check "
        "by judges that took no part.",
        facts=_facts(run_folder),
        sections=sections,
        footer=f"Written {datetime.date.today().isoformat()} from the files in this run's folder.",
    )
    write_text(path, page)
    return path


def _facts(run_folder: Path) -> list[tuple[str, str]]:
    facts = []
    for name in ("candidates", "verdicts", "preferences", "rankings"):
        manifest = load_json(run_folder / name / MANIFEST)
        if manifest is not None:
            facts.append((name, f"{manifest['rows']:,}"))
    judge = (load_json(run_folder / "verdicts" / MANIFEST) or {}).get("judge")
    if isinstance(judge, dict) and judge.get("model"):
        facts.append(("judge", str(judge["model"])))
    seconds = [
        record["seconds"]
        for path in sorted((run_folder / "stages").glob("*.json"))
        if (record := load_json(path)) and "seconds" in record
    ]
    if seconds:
        facts.append(("wall time", f"{sum(seconds) / 60:.1f} minutes"))
    return facts


def _judge_sections(run_folder: Path) -> list[Section]:
    """Return the judge's report card, as far as it was computed."""
    path = run_folder / "report-card" / "report.json"
    if path.is_file():
        from feedback.page.card_page import card_sections

        return card_sections(path)
    manifest = load_json(run_folder / "verdicts" / MANIFEST)
    counts = (manifest or {}).get("counts", {})
    total = sum(counts.values())
    if not total:
        return []
    lines = [[name, count, f"{count / total:.1%}"] for name, count in counts.items()]
    return [
        Section(
            "judge",
            "The judge",
            f"{total:,} calls and how they ended. A failure is never a label.",
            [table(("Outcome", "Calls", "Share"), lines)],
        )
    ]


def _browser_sections(run_folder: Path, limit: int) -> list[Section]:
    verdicts = run_folder / "verdicts"
    if not limit or not (verdicts / MANIFEST).is_file():
        return []
    from feedback.page.card_page import browser_section
    from feedback.report_run import read_evidence

    evidence = read_evidence([verdicts])
    return [browser_section(evidence.arms, evidence.material, limit)]


def _provenance(run_folder: Path) -> list[Section]:
    lines = []
    for path in sorted(run_folder.glob(f"*/{MANIFEST}")):
        manifest = load_json(path) or {}
        if "kind" in manifest:
            shards = manifest.get("shards", [])
            first = shards[0]["sha256"][:12] if shards else ""
            lines.append([path.parent.name, manifest.get("rows", 0), len(shards), first])
    if not lines:
        return []
    versions = (load_json(run_folder / "verdicts" / MANIFEST) or {}).get("versions", {})
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    blocks = [table(("Folder", "Rows", "Shards", "First shard's sha256"), lines)]
    if packages:
        blocks.append(note(f"Made with {packages}."))
    return [Section("provenance", "Where this comes from", "", blocks)]
