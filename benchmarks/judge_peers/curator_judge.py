"""curator 0.1.31: an LLM class whose prompt asks for a verdict, on its online request processor."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

os.environ |= {
    "OPENAI_API_KEY": "none",
    "CURATOR_DISABLE_CACHE": "1",
    "TELEMETRY_ENABLED": "0",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
}


class _Encoding:
    """Counts tokens without the vocabulary that tiktoken would download."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [0] * (len(text) // 4 + 1)


stub: Any = types.ModuleType("tiktoken")
stub.get_encoding = stub.encoding_for_model = lambda *_: _Encoding()
stub.Encoding = _Encoding
sys.modules["tiktoken"] = stub

from bespokelabs import curator  # noqa: E402
from measuring import report  # noqa: E402


class Judge(curator.LLM):
    """One request per pair."""

    def prompt(self, input: dict[str, str]) -> str:
        """Return the question."""
        return (
            f"Two replies to the same conversation are shown below. Which is better?\n"
            f"{input['prompt']}\n\nReply A: {input['a']}\n\nReply B: {input['b']}\n\nA or B?"
        )

    def parse(self, input: dict[str, str], response: str) -> dict[str, str]:
        """Return the verdict."""
        return {"verdict": response.strip()}


def run(rows: list[dict[str, str]]) -> int:
    """Return the rows with a verdict."""
    judge = Judge(
        model_name="mock",
        backend="openai",
        backend_params={
            "base_url": sys.argv[1],
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "max_concurrent_requests": 256,
            "require_all_responses": False,
            "max_retries": 0,
            "invalid_finish_reasons": ["content_filter"],
        },
    )
    found = judge(rows)
    dataset = getattr(found, "dataset", found)
    return sum(row["verdict"] in ("A", "B") for row in dataset)


if __name__ == "__main__":
    report(run)
