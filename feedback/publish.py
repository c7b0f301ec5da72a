"""Shards to a data set: on the Hub by ``--repo NAME``, or as the same files by ``--to DIR``.

``rlaif publish runs/x/preferences runs/x/rankings --repo me/my-data --license cc-by-4.0``

Nothing is uploaded before the judge's gate has passed, the texts were scanned for what must not
leave, the prompts were held against evaluation sets, and whoever publishes has said under which
terms. A second publish of the same shards changes nothing and says so.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from feedback.errors import InputError, RecipeError
from feedback.progress import ProgressBar, say
from feedback.publish_manifest import count_rows

if TYPE_CHECKING:
    from feedback.publish_plan import Plan
    from feedback.publish_scan import Survey
    from feedback.publish_tree import PublishedTree

__all__ = ["PublishOptions", "publish", "run", "stop_at", "survey_or_stop"]


_PACKAGES = ("datasets", "huggingface_hub", "pyarrow", "detect_secrets", "phonenumbers", "stdnum")


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """Shards or a trained model -> the Hub, or the same files in a folder."""

    folders: tuple[Path, ...]
    """Finished shard folders (preferences, rankings; verdicts and candidates where named), folders
    that hold such, or the folder of one trained model."""
    repo: str | None = None
    """Repository on the Hub, as user/name (or name: yours). Made private if it is not there."""
    to: Path | None = None
    """Folder to write the same files to, instead of uploading them."""
    public: bool = False
    """Make a new repository public. Whether one that exists is public is never changed."""
    license: str | None = None
    """Licence of what is published, as the Hub calls it: cc-by-4.0, apache-2.0, other ..."""
    judge_terms: str | None = None
    """Terms attached to the judge's outputs. Needed where an endpoint of somebody else judged."""
    prompt_license: str | None = None
    """Licence of the prompts, in your words."""
    language: tuple[str, ...] = ()
    """Languages of the texts, as ISO 639 codes."""
    tags: tuple[str, ...] = ()
    """More tags for the card."""
    citation: str | None = None
    """How to cite it (BibTeX or text)."""
    redact: bool = False
    """Replace what the scan finds by its kind, such as [EMAIL], and leave out rows of prompts found
    in evaluation sets."""
    allow: tuple[str, ...] = ()
    """Kinds of findings that may leave as they are: secret, email, phone, iban, card, path,
    endpoint, evaluation."""
    eval_set: tuple[Path, ...] = ()
    """Evaluation sets beside those that ship: JSONL with a prompt a line, or a list of hashes."""
    region: str = "US"
    """Country whose phone numbers may be written without a country code."""
    accept_bias: tuple[str, ...] = ()
    """Figures of the judge's report card whose failure is accepted by name."""
    splits: dict[str, float] = field(default_factory=dict)
    """Shares of prompts by split, such as train 0.9 test 0.1; without: train 0.95 test 0.05.
    Folders that rlaif merge has split keep their splits."""
    seed: int = 0
    """Seed of the splits."""
    work: Path | None = None
    """Folder for files on their way to the Hub; None: beside the first folder."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if self.splits and abs(sum(self.splits.values()) - 1) > 1e-6:
            raise RecipeError(f"the shares of --splits sum to {sum(self.splits.values()):g}, not 1")

    @property
    def shares(self) -> dict[str, float]:
        """Return the shares of prompts by split."""
        return self.splits or {"train": 0.95, "test": 0.05}

    def check(self) -> None:
        """Refuse options that say too little or contradict each other.

        Raises:
            RecipeError: names the option.
        """
        if (self.repo is None) == (self.to is None):
            raise RecipeError("give either --repo NAME (the Hub) or --to DIR (a folder)")
        if self.license is None:
            raise RecipeError("say under which licence: --license cc-by-4.0 (or apache-2.0 ...)")
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise RecipeError(f"publishing needs {missing[0]}: pip install 'rlaif[hub]'")


def run(options: PublishOptions) -> None:
    """Publish shard folders."""
    publish(options)


def publish(options: PublishOptions) -> str:
    """Publish shard folders; return where they are.

    Raises:
        GateRefused: a judge fails its report card, and nobody accepted that by name.
        InputError: a folder cannot be published, something was found that must not leave, the
            terms are not stated, or the Hub refused.
        BackendError: the Hub or the way to it failed; the same command continues.
    """
    from feedback.publish_plan import make_plan

    options.check()
    plan = make_plan(options)
    if options.to is not None:
        return _to_folder(plan, options.to)
    assert options.repo is not None
    return _to_hub(plan, options.repo)


def _to_folder(plan: Plan, folder: Path) -> str:
    from feedback.publish_tree import PublishedTree

    with PublishedTree(folder) as tree:
        changed = _write(tree, plan)
    if changed:
        say(f"{count_rows(tree.manifest):,} rows in {folder}, version {plan.tag}")
    else:
        say(f"nothing has changed: {folder} holds these shards already, version {plan.tag}")
    return str(folder)


def _write(tree: PublishedTree, plan: Plan) -> bool:
    """Write the rows unless they are there, then the card; return whether anything changed."""
    fresh = tree.tag != plan.tag
    if fresh:
        tree.write_rows(plan, survey_or_stop(plan))
    else:
        stop_at(plan.options, Counter(tree.manifest["found"]))
    return tree.write_card(plan.card(tree.manifest)) or fresh


def _to_hub(plan: Plan, repo: str) -> str:
    import shutil

    from feedback.publish_hub import HubRepository
    from feedback.publish_tree import PublishedTree

    hub = HubRepository(repo, "dataset", public=plan.options.public)
    plan = replace(plan, repo=hub.name)
    known = hub.publication()
    message = f"Publish {', '.join(plan.configs)} ({plan.tag})"
    work = (plan.options.work or plan.sources[0].folder.parent) / f".publish-{plan.tag}"
    if known is not None and known["tag"] == plan.tag:
        stop_at(plan.options, Counter(known["found"]))
        changed = hub.commit({"README.md": plan.card(known).encode()}, message, tag=plan.tag)
        rows = count_rows(known)
    else:
        with PublishedTree(work) as tree:
            _write(tree, plan)
            rows = count_rows(tree.manifest)
            files = tree.files()
            changed = hub.commit(files, message, tag=plan.tag, stale=hub.stale(files))
    # Also what an earlier run left behind, if it was cut off after its commit.
    shutil.rmtree(work, ignore_errors=True)
    if changed:
        say(f"{rows:,} rows at {hub.address}, version {plan.tag}")
    else:
        say(f"nothing has changed: {hub.address} holds these shards already, version {plan.tag}")
    return hub.address


def survey_or_stop(plan: Plan) -> Survey:
    """Read every row once; stop if something was found that may not leave.

    Raises:
        InputError: something was found, and neither redacted nor allowed.
    """
    from feedback.overlap import load_evaluation_sets
    from feedback.publish_scan import describe, survey

    sets = load_evaluation_sets(plan.evaluation_sets)
    started = time.perf_counter()
    with ProgressBar("scanning", plan.rows) as bar:
        rows = ((source.config, source.read()) for source in plan.sources)
        found = survey(rows, sets, region=plan.options.region, bar=bar)
    seconds = time.perf_counter() - started
    report = found.report
    say(f"{report.rows:,} rows scanned, {report.rows / max(seconds, 1e-9):,.0f} rows/s")
    for line in describe(report, report.counts):
        say(line)
    stop_at(plan.options, report.counts)
    return found


def stop_at(options: PublishOptions, found: Counter[str]) -> None:
    """Stop if something was found that is neither redacted nor allowed.

    Raises:
        InputError: names the kinds, and the ways on.
    """
    from feedback.scan import ScanReport

    kinds = ScanReport(counts=found).blocking(options.allow)
    if kinds and not options.redact:
        counts = ", ".join(f"{kind} ({found[kind]:,})" for kind in kinds)
        raise InputError(
            f"nothing was published: found {counts} in the texts; go on with --redact True, or "
            f"leave them in by name with --allow {' '.join(kinds)}"
        )
