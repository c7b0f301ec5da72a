"""The embedded default models: where they lie. Importing this loads nothing heavy.

``policy`` and ``judge`` are one set of weights that does both; ``second-judge`` was trained on
other dialogues from another seed and serves evaluation alone. The model cards beside the weights
say where they come from, what they can do and under which licence they stand.
"""

from __future__ import annotations

from pathlib import Path

from feedback.errors import InputError, nearest

__all__ = ["NAMES", "model_path"]

_FOLDERS = {"policy": "assistant", "judge": "assistant", "second-judge": "second-judge"}
_PREFIX = "pocket:"
NAMES = tuple(_PREFIX + name for name in _FOLDERS)
"""What a user writes where a model is asked for."""


def model_path(name: str) -> Path:
    """Return the folder of a pocket model: ``policy``, ``judge`` or ``second-judge``.

    The prefix ``pocket:`` may stand before the name.

    Raises:
        InputError: no such model; the message names the nearest.
    """
    folder = _FOLDERS.get(name.removeprefix(_PREFIX))
    if folder is None:
        close = nearest(_PREFIX + name.removeprefix(_PREFIX), NAMES)
        raise InputError(f"no pocket model named {name!r}{close} (there are: {', '.join(NAMES)})")
    return Path(__file__).parent / folder
