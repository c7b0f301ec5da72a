"""This project: the endpoint engine alone, or (third word ``run``) a whole labelling run."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measuring import report

from feedback.backends import JudgeCall
from feedback.backends.openai import OpenAIBackend
from feedback.config import EngineOptions
from feedback.records import Candidates, Completion, Message, encode


def engine() -> EngineOptions:
    """Return the mock endpoint."""
    return EngineOptions(backend="openai", model="mock", base_url=sys.argv[1], concurrency=256)


def calls(rows: list[dict[str, str]]) -> Iterator[JudgeCall]:
    """Yield one call per pair."""
    for number, row in enumerate(rows):
        text = f"{row['prompt']}\n\nReply A: {row['a']}\n\nReply B: {row['b']}\n\nA or B?"
        message = Message(role="user", content=text)
        yield JudgeCall(call_id=str(number), messages=(message,), choices=("A", "B"))


def run_engine(rows: list[dict[str, str]]) -> int:
    """Return the rows with log-probabilities of both labels."""
    backend = OpenAIBackend(engine())
    answered = sum(len(reply.choice_logprobs or ()) == 2 for reply in backend.judge(calls(rows)))
    backend.close()
    return answered


def run_labelling(rows: list[dict[str, str]]) -> int:
    """Candidates in, verdict shards out; one order, so that a pair is one request."""
    from feedback import labeling
    from feedback.records import Verdict
    from feedback.shards import read_jsonl, shard_paths

    with tempfile.TemporaryDirectory() as folder:
        candidates, out = Path(folder) / "candidates.jsonl", Path(folder) / "verdicts"
        with candidates.open("wb") as file:
            for number, row in enumerate(rows):
                completions = [
                    Completion(completion_id=f"{number}{name}", completion=row[name], model="x")
                    for name in ("a", "b")
                ]
                line = Candidates(
                    prompt_id=str(number), prompt=row["prompt"], completions=completions
                )
                file.write(encode(line) + b"\n")
        labeling.run(
            labeling.JudgeOptions(
                candidates=candidates, out=out, engine=engine(), orders="one", cache="none"
            )
        )
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["rows"] + manifest["failed"] == len(rows)
        return sum(
            row.outcome == "decided"
            for path in shard_paths(out, "verdicts")
            for row in read_jsonl(path, Verdict)
        )


if __name__ == "__main__":
    report(run_labelling if sys.argv[4:] == ["run"] else run_engine)
