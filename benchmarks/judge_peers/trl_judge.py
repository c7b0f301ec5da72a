"""TRL 1.0.0's OpenAIPairwiseJudge, the last release with judges."""

from __future__ import annotations

import os
import sys

os.environ |= {
    "OPENAI_BASE_URL": sys.argv[1],
    "OPENAI_API_KEY": "none",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}

from measuring import report
from trl.experimental.judges import OpenAIPairwiseJudge

judge = OpenAIPairwiseJudge("mock", max_requests=None)


def run(rows: list[dict[str, str]]) -> int:
    """Return the rows with a valid answer; -1 is TRL's word for invalid."""
    prompts = [row["prompt"] for row in rows]
    completions = [[row["a"], row["b"]] for row in rows]
    return sum(rank in (0, 1) for rank in judge.judge(prompts, completions))


report(run)
