"""What a text looks like: counts of lists, headers, bold and code, apart from what it says.

Densities follow Arena-Hard's style control: elements per token, a pair's difference over its sum.
Tokens are words here, so that no tokenizer is needed; the ratio of two densities hardly changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.observations import Pairs

__all__ = ["ELEMENTS", "Style", "StyleColumns", "read_style", "style_columns"]

ELEMENTS = ("list", "header", "bold", "code")

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_INLINE_CODE = re.compile(r"`[^`\n]+`")
_LIST = re.compile(r"^[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_HEADER = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


class Style(NamedTuple):
    """Counts of one text."""

    characters: int
    words: int
    list: int
    header: int
    bold: int
    code: int


def read_style(text: str) -> Style:
    """Count the elements of a text; what stands inside a code block is code and nothing else."""
    rest, blocks = _FENCED.subn("\n", text)
    rest, inline = _INLINE_CODE.subn(" ", rest)
    return Style(
        characters=len(text),
        words=len(text.split()),
        list=len(_LIST.findall(rest)),
        header=len(_HEADER.findall(rest)),
        bold=len(_BOLD.findall(rest)),
        code=blocks + inline,
    )


@dataclass(frozen=True, slots=True)
class StyleColumns:
    """Style of the pairs whose two texts are at hand."""

    rows: npt.NDArray[np.bool_]
    """Mask over all pairs: both texts are known."""
    counts: npt.NDArray[np.float64]
    """(m, 2, 6): the fields of ``Style`` for a and b, of the m pairs in ``rows``."""

    def count(self, name: str) -> npt.NDArray[np.float64]:
        """Return (m, 2): one field for a and b."""
        return np.asarray(self.counts[:, :, Style._fields.index(name)])

    def has(self, name: str) -> npt.NDArray[np.bool_]:
        """Return (m, 2): whether the element occurs at all."""
        return np.asarray(self.count(name) > 0)

    def contrast(self, name: str) -> npt.NDArray[np.float64]:
        """Return (m,): (a - b) / (a + b) of the element's density, or of the words."""
        values = self.count(name)
        if name != "words":
            values = values / np.maximum(self.count("words"), 1)
        total = values.sum(axis=1)
        return np.divide(
            values[:, 0] - values[:, 1], total, out=np.zeros(len(values)), where=total > 0
        )


def style_columns(pairs: Pairs) -> StyleColumns:
    """Read the style of both texts of every pair; each text is read once."""
    known: dict[str, Style] = {}

    def style(text: str) -> Style:
        if text not in known:
            known[text] = read_style(text)
        return known[text]

    rows = np.array([a is not None and b is not None for a, b in pairs.completions], bool)
    counts = [
        (style(a.completion), style(b.completion))
        for a, b in pairs.completions
        if a is not None and b is not None
    ]
    return StyleColumns(rows, np.array(counts, float).reshape(-1, 2, len(Style._fields)))
