"""alpaca_eval 0.6.6: its weighted annotator (one token, log-probabilities), 64 workers."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "OPENAI_API_BASE": sys.argv[1],
    "OPENAI_BASE_URL": sys.argv[1],
    "OPENAI_API_KEY": "none",
    "OPENAI_MAX_CONCURRENCY": "64",
}

from alpaca_eval.annotators import PairwiseAnnotator
from measuring import report

PROMPT = """<|im_start|>system
You compare two outputs.
<|im_end|>
<|im_start|>user
{instruction}

# Output (m)
{output_1}

# Output (M)
{output_2}

Which is best, m or M?
<|im_end|>
"""
CONFIG = """
judge:
  prompt_template: "judge/prompt.txt"
  fn_completions: "openai_completions"
  completions_kwargs:
    model_name: "mock"
    max_tokens: 1
    temperature: 0
    logprobs: true
    top_logprobs: 5
    requires_chatml: true
    price_per_token: 0.000001
  fn_completion_parser: "logprob_parser"
  completion_parser_kwargs:
    numerator_token: "m"
    denominator_tokens: ["m", "M"]
    is_binarize: false
  completion_key: "completions_all"
  batch_size: 1
"""


def run(rows: list[dict[str, str]]) -> int:
    """Return the rows with a preference."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "judge"
        config.mkdir()
        (config / "prompt.txt").write_text(PROMPT)
        (config / "configs.yaml").write_text(CONFIG)
        judge = PairwiseAnnotator(
            annotators_config=str(config),
            base_dir=folder,
            caching_path=None,
            is_avoid_reannotations=False,
        )
        work = [
            {"instruction": row["prompt"], "output_1": row["a"], "output_2": row["b"]}
            for row in rows
        ]
        found = judge(work, chunksize=512)
    return sum(row["preference"] is not None and row["preference"] >= 1 for row in found)


if __name__ == "__main__":
    report(run)
