"""What the two engines that send chat completions, ``openai`` and ``batch``, take in ``extra``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from feedback.config import EngineOptions, option_values
from feedback.errors import BackendError, RecipeError, nearest

if TYPE_CHECKING:
    from feedback.backends.chat import ChatTokenizer

__all__ = ["HostedExtra", "extra_of", "load_tokenizer"]

Extra = TypeVar("Extra", bound="HostedExtra")


@dataclass(frozen=True, kw_only=True)
class HostedExtra:
    """Keys of ``extra`` that both understand."""

    tokenizer: str | None = None
    """The model's tokenizer, a folder or a name on the Hub: questions that are too long are then
    cut to the token, both completions alike, and flagged. None: they are sent whole."""
    max_length: int | None = None
    """Longest question and reply together, in tokens, beside ``tokenizer``; None: what the server
    says (vLLM does)."""
    headers: dict[str, str] | None = None
    """Further request headers."""
    body: dict[str, Any] | None = None
    """Further fields of every request body, such as chat_template_kwargs."""
    server: str | None = None
    """Name of the server in verdicts, in place of host and port: for a server that is started again
    elsewhere, so that a run goes on there. None: another host or port is another judge."""


def extra_of(kind: type[Extra], options: EngineOptions) -> Extra:
    """Return an engine's ``extra``, checked.

    Raises:
        RecipeError: it holds an unknown key, a value of the wrong type, or one that does nothing.
    """
    known = sorted(entry.name for entry in dataclasses.fields(kind))
    for key in options.extra:
        name = key.replace("-", "_")
        if name not in known:
            raise RecipeError(
                f"engine.extra: unknown key {key!r}{nearest(name, known)} (backend "
                f"{options.backend!r} knows {', '.join(known)})"
            )
    extra = kind(**option_values(kind, options.extra, prefix="engine.extra."))
    if extra.max_length is not None and extra.tokenizer is None:
        raise RecipeError("extra.max_length does nothing without extra.tokenizer")
    return extra


def load_tokenizer(extra: HostedExtra) -> ChatTokenizer | None:
    """Return the tokenizer that cuts long questions, if one is named.

    Raises:
        BackendError: it cannot be loaded.
    """
    if extra.tokenizer is None:
        return None
    # Seconds of imports, for those who ask for it.
    from transformers import AutoTokenizer

    from feedback.backends.chat import ChatTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(extra.tokenizer)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise BackendError(f"cannot load the tokenizer {extra.tokenizer!r}: {first}") from error
    arguments = (extra.body or {}).get("chat_template_kwargs")
    return ChatTokenizer(tokenizer, template_arguments=arguments)
