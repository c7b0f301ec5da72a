"""The pocket model's chat format and tokenizer.

A turn is its role's token, its text and ``<eos>``; nothing stands between turns, and nothing before the
first one::

    <|user|>I need a table for two.<eos><|assistant|>For what date?<eos>

``<pad>`` is a token of its own, so that a padded ``<eos>`` is never masked out of a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from feedback.records import Message

__all__ = [
    "CHAT_TEMPLATE",
    "EOS",
    "LABELS",
    "PAD",
    "SPECIAL",
    "TAGS",
    "chat_text",
    "save_tokenizer",
    "train_tokenizer",
]

PAD, EOS = "<pad>", "<eos>"
SPECIAL = (PAD, EOS, "<|system|>", "<|user|>", "<|assistant|>")
LABELS = ("A", "B", "C", "D", "1", "2", "3", "4", "5")
"""Verdict labels that must be one token each, at the beginning of a turn."""
TAGS = (
    "<conversation>",
    "</conversation>",
    "<reply>",
    "</reply>",
    *(f"<{mark}reply_{name}>" for name in ("a", "b", "1", "2") for mark in ("", "/")),
    *(f'<reply name="{name}">' for name in "ABCD"),
)
"""Tags of the judge templates, one token each: shorter questions, and clear places to look from."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<eos>' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}\n"
)
# Words with their leading space, numbers in pieces of at most two digits (so that "11:30" is three
# pieces wherever it stands and two equal numbers look equal), the rest by itself.
_PIECES = r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def chat_text(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """Return what the chat template makes of ``messages``; a test keeps the two equal."""
    text = "".join(f"<|{message['role']}|>{message['content']}{EOS}" for message in messages)
    return text + "<|assistant|>" if add_generation_prompt else text


def train_tokenizer(texts: Iterable[str], *, size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE of ``size`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    """Save with special tokens and chat template, as ``AutoTokenizer`` reads it; return that object."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast
