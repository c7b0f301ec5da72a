"""What a sampling stage would send, counted before anything is: calls, tokens and price."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from feedback.backends import SampleCall
from feedback.budget import Price, call_tokens
from feedback.config import ENDPOINTS, EngineOptions
from feedback.run_folder import changed_setting
from feedback.shards import MANIFEST, shard_paths, whole_lines
from feedback.verdict_index import SeenIds

__all__ = ["Estimate", "finished_prompts", "needs_nothing"]


class _Id(msgspec.Struct):
    prompt_id: str


def finished_prompts(folder: Path) -> SeenIds:
    """Return the prompts of which a candidates folder has its row; nothing is written to it."""
    decoder = msgspec.json.Decoder(_Id)
    done = SeenIds()
    for path in shard_paths(folder, "candidates"):
        for line in whole_lines(path):
            done.add(decoder.decode(line).prompt_id, 0)
    return done


def needs_nothing(folder: Path, record: dict[str, Any], prompt_ids: Iterable[str]) -> bool:
    """Return whether a folder is finished, made with these settings, and has every prompt's row.

    Such a folder is left as it is: what was made from it names it by its manifest.
    """
    if not (folder / MANIFEST).is_file() or changed_setting(folder, record) is not None:
        return False
    with contextlib.closing(finished_prompts(folder)) as done:
        return all(prompt_id in done for prompt_id in prompt_ids)


@dataclass(slots=True, kw_only=True)
class Estimate:
    """Calls to one engine, summed up."""

    engine: EngineOptions
    price: Price | None
    calls: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    cost: float = 0.0

    def add(self, calls: Iterable[SampleCall]) -> None:
        """Count calls, their replies as long as they may be."""
        for call in calls:
            usage = call_tokens(call)
            self.calls += 1
            self.prompt_tokens += usage.prompt_tokens
            self.reply_tokens += usage.completion_tokens
            if self.price is not None:
                self.cost += self.price.of(usage, batch=self.engine.backend == "batch")

    def lines(self, *, most: str = "") -> Iterator[str]:
        """Yield the lines that say it; ``most`` is "at most " where answers decide."""
        yield f"{most}{self.calls} calls to {self.engine.model}; nothing was sent"
        yield (
            f"about {self.prompt_tokens} prompt tokens (estimated at 4 characters each) and at "
            f"most {self.reply_tokens} tokens of completions"
        )
        if self.engine.backend not in ENDPOINTS:
            yield "price: none, the model runs on this machine"
        elif self.price is None:
            yield f"price: unknown; add {self.engine.model!r} to the price table to see it"
        else:
            yield f"price: at most ${self.cost:.4f} ({self.price.note})"
