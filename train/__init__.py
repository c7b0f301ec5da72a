"""Training on preference shards: SFT, reward model, DPO, RRHF and PPO on one packed engine."""

from __future__ import annotations

__all__: list[str] = []
