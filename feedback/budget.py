"""What calls cost, and the limits that stop a run cleanly.

Prices come from a TOML file that the user can edit (``prompts/prices.toml``). A limit is checked
before a call is sent, with the calls in flight counted at their expected price, so that a run stops
at the limit and not after it.
"""

from __future__ import annotations

import datetime
import re
import threading
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from feedback.backends import Backend, Charging, JudgeCall, SampleCall
from feedback.config import ENDPOINTS, EngineOptions
from feedback.errors import BudgetExceeded, InputError, nearest
from feedback.records import Message, Usage
from feedback.templates import prompts_folder

__all__ = [
    "Budget",
    "Price",
    "Spent",
    "call_tokens",
    "engine_price",
    "estimate_tokens",
    "find_price",
]

# What a token of ordinary text holds, before a run has measured it.
_CHARACTERS_PER_TOKEN = 4.0
_TOKENS_PER_MESSAGE = 4
_MEANS = {"checked": "a date such as 2026-01-31", "source": "a text in quotes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Price of a model, in US dollars per million tokens."""

    prompt: float
    completion: float
    cached: float | None = None
    """Of prompt tokens read from the provider's cache; None: as ``prompt``."""
    batch: float = 1.0
    """Factor on all prices for calls through the Batch API."""
    checked: datetime.date | None = None
    """Day on which somebody compared these figures with ``source``."""
    source: str = ""
    """Where they come from."""

    @property
    def note(self) -> str:
        """Return how old the price is and where it comes from, for whoever relies on it."""
        if self.checked is None:
            return "a price without a date: check it"
        return f"price as of {self.checked}" + (f", {self.source}" if self.source else "")

    def of(self, usage: Usage, *, batch: bool = False) -> float:
        """Return the price of one call in US dollars."""
        cached = self.prompt if self.cached is None else self.cached
        total = (
            (usage.prompt_tokens - usage.cached_tokens) * self.prompt
            + usage.cached_tokens * cached
            + usage.completion_tokens * self.completion
        )
        return total / 1e6 * (self.batch if batch else 1.0)


def find_price(model: str, prices: Path | None = None) -> Price | None:
    """Return the price of ``model``, or None where the price file does not name it.

    Raises:
        InputError: the file is missing, or not a price table; names the key.
    """
    path = prices or prompts_folder() / "prices.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the price file: {error.strerror}", path=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid TOML: {error}", path=path) from error
    known = {name: _price(name, entry, path) for name, entry in table.items()}
    fitting = [
        name
        for name in known
        if model == name or re.fullmatch(re.escape(name) + r"[-@]\d[\d-]*", model)
    ]
    return known[max(fitting, key=len)] if fitting else None


def engine_price(
    engine: EngineOptions, *, prices: Path | None = None, max_cost: float | None = None
) -> Price | None:
    """Return the price of an engine's model; None for engines in this process, or if unknown.

    Raises:
        InputError: the price is unknown, and there is a limit on cost.
    """
    paid = engine.backend in ENDPOINTS
    price = find_price(engine.model, prices) if paid else None
    if paid and price is None and max_cost is not None:
        where = prices or "prompts/prices.toml"
        raise InputError(
            f"--max-cost needs the price of {engine.model!r}; add it to {where} "
            "(0 for a server of your own)"
        )
    return price


def _price(name: str, entry: Any, path: Path) -> Price:
    names = {entry.name for entry in fields(Price)}
    if not isinstance(entry, dict):
        raise InputError(f"{name!r} is not a table of prices", path=path)
    for key, value in entry.items():
        if key not in names:
            raise InputError(f"[{name}] unknown key {key!r}{nearest(key, names)}", path=path)
        if key == "checked":
            fits = isinstance(value, datetime.date)
        elif key == "source":
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if not fits:
            raise InputError(
                f"[{name}] {key} is {value!r}, not {_MEANS.get(key, 'a price')}", path=path
            )
    if missing := {"prompt", "completion"} - set(entry):
        raise InputError(f"[{name}] has no {min(missing)!r}", path=path)
    return Price(**entry)


def estimate_tokens(
    messages: Sequence[Message],
    reply_tokens: int,
    characters_per_token: float = _CHARACTERS_PER_TOKEN,
) -> Usage:
    """Return the tokens a call will take, from its number of characters."""
    characters = sum(len(turn["content"]) for turn in messages)
    return Usage(
        prompt_tokens=round(characters / characters_per_token)
        + _TOKENS_PER_MESSAGE * len(messages),
        completion_tokens=reply_tokens,
    )


def call_tokens(
    call: JudgeCall | SampleCall, characters_per_token: float = _CHARACTERS_PER_TOKEN
) -> Usage:
    """Return the tokens that a call will take at most."""
    replies = call.n if isinstance(call, SampleCall) else 1
    return estimate_tokens(call.messages, replies * call.max_tokens, characters_per_token)


@dataclass(slots=True, kw_only=True)
class Spent:
    """Running totals of a run."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, usage: Usage, cost: float) -> None:
        """Count what was billed."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.cost += cost


@dataclass(slots=True)
class _Open:
    """A call under way: what it is expected to take, and what it has wasted so far."""

    tokens: int
    cost: float
    characters: int
    wasted: Usage = field(default_factory=Usage)


@dataclass(slots=True, kw_only=True)
class Budget:
    """Limits of a run, what it has spent and what is under way.

    ``admit`` before a call is sent, ``waste`` for each attempt that was billed and gave nothing,
    ``settle`` when it is answered. The limits hold for one run: continuing an interrupted one
    starts from zero. Engines speak to it from threads of their own.
    """

    price: Price | None = None
    batch: bool = False
    max_cost: float | None = None
    """US dollars."""
    max_calls: int | None = None
    max_tokens: int | None = None
    """Prompt plus completion tokens."""
    spent: Spent = field(default_factory=Spent)
    reached: str = ""
    """The limit that stopped the run, in words; empty while none has."""
    _open: dict[str, _Open] = field(default_factory=dict)
    _open_tokens: int = 0
    _open_cost: float = 0.0
    _characters: int = 0
    _measured_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def said(self) -> str:
        """What the run has spent, for the end of a line; empty where nothing has a price."""
        return "" if self.price is None else f", ${self.spent.cost:.4f} spent"

    def stop(self) -> BudgetExceeded:
        """Return the error that ends a sampling run at the limit that was reached."""
        return BudgetExceeded(
            f"stopped at {self.reached} with {self.spent.calls} calls answered in this run"
            f"{self.said}; what they gave is on disk: run the same command again to continue"
        )

    def expect(self, call: JudgeCall | SampleCall) -> Usage:
        """Return the tokens that a call is expected to take, by what this run has measured."""
        if self._measured_tokens > 1000:
            return call_tokens(call, self._characters / self._measured_tokens)
        return call_tokens(call)

    def admit_all(self, calls: Sequence[JudgeCall | SampleCall]) -> bool:
        """Return whether calls fit into the limits together; count all as under way, or none."""
        for place, call in enumerate(calls):
            if not self.admit(call):
                self.release(before.call_id for before in calls[:place])
                return False
        return True

    def release(self, call_ids: Iterable[str]) -> None:
        """Take back calls that were admitted and not sent."""
        with self._lock:
            for call_id in call_ids:
                call = self._open.pop(call_id)
                self._open_tokens -= call.tokens
                self._open_cost -= call.cost

    def send(self, call: JudgeCall | SampleCall) -> None:
        """Note what an admitted call holds, where it was planned with other text."""
        with self._lock:
            self._open[call.call_id].characters = _characters(call)

    def admit(self, call: JudgeCall | SampleCall) -> bool:
        """Return whether a call fits into the limits; if so, count it as under way."""
        usage = self.expect(call)
        tokens = usage.prompt_tokens + usage.completion_tokens
        cost = self._price(usage)
        with self._lock:
            if not self._fits(calls=1, tokens=tokens, cost=cost):
                return False
            self._open[call.call_id] = _Open(tokens, cost, _characters(call))
            self._open_tokens += tokens
            self._open_cost += cost
        return True

    def _fits(self, *, calls: int = 0, tokens: int = 0, cost: float = 0.0) -> bool:
        """Return whether so much more fits beside what is spent and under way."""
        checks = (
            ("calls", self.max_calls, self.spent.calls + len(self._open) + calls, "{:d}"),
            ("tokens", self.max_tokens, self.spent.tokens + self._open_tokens + tokens, "{:d}"),
            ("cost", self.max_cost, self.spent.cost + self._open_cost + cost, "${:.4g}"),
        )
        for name, limit, value, style in checks:
            if limit is not None and value > limit:
                self.reached = f"--max-{name} {style.format(limit)}"
                return False
        return True

    def _price(self, usage: Usage) -> float:
        return 0.0 if self.price is None else self.price.of(usage, batch=self.batch)

    def charged(self, backend: Backend) -> Backend:
        """Return an engine that tells this budget of what it wastes."""
        if isinstance(backend, Charging):
            backend.on_waste = self.waste
        return backend

    def waste(self, call_id: str, usage: Usage) -> bool:
        """Count an attempt that was billed and gave nothing; return whether another one fits.

        What the call was expected to take stays set aside, for that other attempt.
        """
        with self._lock:
            call = self._open.get(call_id)
            if call is None:
                return True
            call.wasted += usage
            self.spent.add(usage, self._price(usage))
            return self._fits()

    def settle(self, call_id: str, usage: Usage) -> float:
        """Count an answered call; return its cost in US dollars.

        Args:
            call_id: of the call.
            usage: of all its attempts, those that ``waste`` was told of included.
        """
        with self._lock:
            call = self._open.pop(call_id)
            self._open_tokens -= call.tokens
            self._open_cost -= call.cost
            wasted = call.wasted
            last = Usage(
                prompt_tokens=max(usage.prompt_tokens - wasted.prompt_tokens, 0),
                cached_tokens=max(usage.cached_tokens - wasted.cached_tokens, 0),
                completion_tokens=max(usage.completion_tokens - wasted.completion_tokens, 0),
            )
            if last.prompt_tokens:
                self._characters += call.characters
                self._measured_tokens += last.prompt_tokens
            self.spent.calls += 1
            self.spent.add(last, self._price(last))
            return self._price(wasted + last)


def _characters(call: JudgeCall | SampleCall) -> int:
    return sum(len(turn["content"]) for turn in call.messages)
