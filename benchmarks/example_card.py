"""The data set card of a run, as `rlaif publish` writes it, into docs/example-dataset-card.md.

    rlaif run --recipe recipes/pocket.toml
    python benchmarks/example_card.py runs/pocket

The run is published to a scratch folder; the page is that folder's README.md, unchanged but for a
line that says so.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from feedback.publish import PublishOptions, publish
from feedback.shards import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "example-dataset-card.md"
NOTE = "<!-- Written by rlaif publish; copied here by benchmarks/example_card.py. -->\n"


def card_of(run: Path) -> str:
    """Return the card of a run's preferences and rankings."""
    with tempfile.TemporaryDirectory(prefix="rlaif-card-") as scratch:
        options = PublishOptions(
            folders=(run / "preferences", run / "rankings"),
            to=Path(scratch) / "booking-preferences",
            license="apache-2.0",
            language=("en",),
            prompt_license="Apache 2.0: written for this project (prompts/sets).",
            judge_terms="none: the judge is a model of this project, run on this machine",
            tags=("booking",),
        )
        return (Path(publish(options)) / "README.md").read_text(encoding="utf-8")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    _, header, body = card_of(options.run).split("---\n", 2)
    write_text(options.out, f"---\n{header}---\n{NOTE}{body}")
    print(options.out)


if __name__ == "__main__":
    main()
