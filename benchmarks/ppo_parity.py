"""Run TRL 1.12.0's own PPO arithmetic on fixed numbers and record what it gives.

TRL 1.12.0 is the last release with a PPO trainer. Its reward shaping, GAE and losses stand inside
``PPOTrainer.train``; this script cuts those lines out of the installed source, runs them on drawn
inputs and writes both to ``tests/recorded/trl112_ppo.json``, which ``tests/test_ppo_parity.py``
compares with ours. TRL 1.12.0 does not fit beside a newer TRL, so it comes from a folder:

    pip install --no-deps --target /tmp/trl112 trl==1.12.0
    python benchmarks/ppo_parity.py --trl /tmp/trl112
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

RECORD = Path(__file__).parent.parent / "tests" / "recorded" / "trl112_ppo.json"
PAD, EOS, LENGTH = 0, 1, 6
SETTINGS = [
    {"kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0, "lam": 0.95},
    {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9, "lam": 0.8},
]


def between(source: str, start: str, end: str) -> str:
    """Return the lines of ``source`` from the one with ``start`` up to the one with ``end``."""
    lines = source.splitlines()
    first = next(index for index, line in enumerate(lines) if start in line)
    last = next(index for index, line in enumerate(lines) if index > first and end in line)
    return textwrap.dedent("\n".join(lines[first:last]))


def draw(seed: int) -> dict[str, torch.Tensor]:
    """Return a rollout of four completions: one cut off, three that end at different places."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    responses = torch.randint(2, 20, (4, LENGTH), generator=generator)
    for row, length in enumerate((6, 3, 1, 5)):
        if length < LENGTH:
            responses[row, length - 1] = EOS
            responses[row, length:] = PAD
    logprobs = -normal(4, LENGTH).abs()
    return {
        "responses": responses,
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.3 * normal(4, LENGTH),
        "values": normal(4, LENGTH),
        "scores": normal(4),
        "new_logprobs": logprobs + 0.3 * normal(4, LENGTH),
        "new_values": normal(4, LENGTH),
    }


def run_trl(setting: dict[str, Any], drawn: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Execute TRL's lines on the drawn rollout; return masks, advantages, returns and losses."""
    from trl.experimental.ppo import ppo_trainer
    from trl.experimental.utils import first_true_indices

    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    args = SimpleNamespace(
        **setting, kl_coef=0.05, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, temperature=1.0
    )
    scope: dict[str, Any] = {
        **vars(ppo_trainer),
        **{name: tensor.clone() for name, tensor in drawn.items()},
        "args": args,
        "sequence_lengths": first_true_indices(drawn["responses"] == PAD) - 1,
        "accelerator": SimpleNamespace(backward=lambda loss: None),
        "micro_batch_inds": torch.arange(4),
    }
    exec(between(source, "response_idxs = torch.arange", "empty_cache()"), scope)
    exec("mb_advantage, mb_return, mb_values = advantages, returns, values", scope)
    exec("mb_logprobs, vpred = logprobs, new_values", scope)
    exec("new_logprobs = torch.masked_fill(new_logprobs, padding_mask, INVALID_LOGPROB)", scope)
    exec(between(source, "vpred = torch.masked_fill", "accelerator.backward"), scope)
    exec(
        "pg_clipfrac = masked_mean((pg_losses2 > pg_losses).float(), ~padding_mask)\n"
        "mean_kl = kl.sum(1).mean()",
        scope,
    )
    return {
        "mask": ~scope["padding_mask"],
        "value_mask": ~scope["padding_mask_p1"],
        "terminal": scope["actual_end"],
        "advantages": scope["advantages"],
        "returns": torch.masked_fill(scope["returns"], scope["padding_mask_p1"], 0),
        "policy_loss": scope["pg_loss"],
        "policy_clipfrac": scope["pg_clipfrac"],
        "value_loss": scope["vf_loss"],
        "value_clipfrac": scope["vf_clipfrac"],
        "loss": scope["loss"],
        "kl": scope["mean_kl"],
    }


def main() -> None:
    """Record TRL's numbers, or compare with the recorded ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", type=Path, required=True, help="folder with TRL 1.12.0")
    options = parser.parse_args()
    sys.path.insert(0, str(options.trl))
    import trl

    if trl.__version__ != "1.12.0":
        raise SystemExit(f"found TRL {trl.__version__} in {options.trl}; it must be 1.12.0")
    cases = []
    for seed, setting in enumerate(SETTINGS):
        drawn = draw(seed)
        found = run_trl(setting, drawn)
        cases.append(
            {
                "setting": setting,
                "inputs": {name: tensor.tolist() for name, tensor in drawn.items()},
                "outputs": {name: tensor.tolist() for name, tensor in found.items()},
            }
        )
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"trl": trl.__version__, "cases": cases}) + "\n")
    print(f"wrote {len(cases)} cases to {RECORD}")


if __name__ == "__main__":
    main()
