"""Hashes of an evaluation set's prompts, for the leak check of publishing.

    python benchmarks/evaluation_hashes.py NAME PROMPTS.jsonl[.gz] "where the set comes from"

writes prompts/evaluation/NAME.txt. Only hashes are kept: nothing of the set can be read from them.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from feedback.overlap import write_hashes


def main() -> None:
    """Write one list."""
    name, source, about = sys.argv[1:4]
    opener = gzip.open if source.endswith(".gz") else open
    with opener(source, "rt", encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    path = Path(__file__).parent.parent / "prompts" / "evaluation" / f"{name}.txt"
    print(f"{write_hashes(path, prompts, about=about)} prompts -> {path}")


if __name__ == "__main__":
    main()
