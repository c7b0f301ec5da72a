"""What is published comes back as the very rows, through Parquet and ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published_rows import PLAIN, ROWS

from feedback.publish_parquet import SplitWriter
from feedback.publish_schema import CONFIGS, features, holds_messages, record_of, row_of


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_survive_parquet(config: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    rows: list[Any] = ROWS[config]
    messages = any(holds_messages(row) for row in rows)
    with SplitWriter(tmp_path, config, "train", features(config, messages=messages)) as writer:
        for row in rows:
            writer.add(record_of(row, config, messages=messages))
    loaded = load_dataset(
        "parquet",
        data_files=str(tmp_path / config / "train-*.parquet"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert loaded.features == features(config, messages=messages)
    assert [row_of(record, config) for record in loaded] == rows


def test_one_chat_row_makes_messages_of_all(tmp_path: Path) -> None:
    chat, plain = ROWS["preferences"][0], PLAIN
    assert holds_messages(chat) and not holds_messages(plain)
    record = record_of(plain, "preferences", messages=True)
    assert record["prompt"] == [{"role": "user", "content": plain.prompt}]
    assert record["chosen"] == [{"role": "assistant", "content": plain.chosen}]
    text = record_of(plain, "preferences", messages=False)
    assert text["prompt"] == plain.prompt and row_of(text, "preferences") == plain


def test_a_record_of_another_shape_is_refused() -> None:
    record = record_of(PLAIN, "preferences", messages=False)
    with pytest.raises(ValueError, match="p_chosen"):
        row_of({**record, "p_chosen": "high"}, "preferences")
