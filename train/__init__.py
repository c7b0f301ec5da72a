"""Training on preference shards: SFT, reward model, DPO, RRHF and PPO on one packed engine."""

from __future__ import annotations

import logging

__all__: list[str] = []


def _worth_telling(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


# peft imports bitsandbytes wherever that is installed, which then tells every run on a CPU of a
# faster kernel that only 4-bit weights there would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_worth_telling)
