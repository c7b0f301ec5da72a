"""Advantages, KL reward, clipping and value loss against the numbers of TRL 1.12.0's own code.

``benchmarks/ppo_parity.py`` ran that code and recorded its inputs and outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.advantages import gae, kl_terms, masked_whiten, shape_rewards
from train.ppo_losses import policy_loss, value_loss

CASES = json.loads((Path(__file__).parent / "recorded" / "trl112_ppo.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["setting"]["kl_estimator"])
def test_same_numbers_as_trl(case: dict[str, Any]) -> None:
    setting = case["setting"]
    given = {name: torch.tensor(value) for name, value in case["inputs"].items()}
    wanted = {name: torch.tensor(value) for name, value in case["outputs"].items()}
    mask, states = wanted["mask"], wanted["value_mask"]
    kl = kl_terms(given["logprobs"], given["ref_logprobs"], mask, estimator=setting["kl_estimator"])
    # TRL puts the score behind the EOS where there is room, on a state of its own.
    rewards = shape_rewards(given["scores"], kl, states, kl_coef=0.05, terminal=wanted["terminal"])
    if setting["whiten_rewards"]:
        rewards = masked_whiten(rewards, states, shift_mean=False)
    values = given["values"].masked_fill(~states, 0.0)
    advantages, returns = gae(rewards, values, states, gamma=setting["gamma"], lam=setting["lam"])
    advantages = masked_whiten(advantages, mask)
    policy = policy_loss(given["new_logprobs"], given["logprobs"], advantages, mask)
    value = value_loss(given["new_values"], values, returns, states)
    for found, name in (
        (kl.sum(1).mean(), "kl"),
        (advantages, "advantages"),
        (returns, "returns"),
        (policy.loss, "policy_loss"),
        (policy.clipfrac, "policy_clipfrac"),
        (value.loss, "value_loss"),
        (value.clipfrac, "value_clipfrac"),
        (policy.loss + 0.1 * value.loss, "loss"),
    ):
        torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_cases_reach_every_branch() -> None:
    """Both estimators, whitening on and off, completions with and without room behind the EOS."""
    assert {case["setting"]["kl_estimator"] for case in CASES} == {"k1", "k3"}
    assert {case["setting"]["whiten_rewards"] for case in CASES} == {True, False}
    for case in CASES:
        assert case["outputs"]["mask"] != case["outputs"]["value_mask"]
        assert 0 < case["outputs"]["policy_clipfrac"] < 1
