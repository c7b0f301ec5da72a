"""Our losses against TRL's own code on the same numbers: its trainers compute, ours must agree.

The log-probabilities and rewards that ours are given come from plain forward passes of one
sequence at a time, so TRL's padding and masks are checked on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train import losses
from train.losses import PairLogps

ROWS = [
    {
        "prompt": "When does it open?",
        "chosen": " At nine.",
        "rejected": " No idea, sorry about it.",
    },
    {"prompt": "A table for two", "chosen": " Booked for seven tonight.", "rejected": " Fine"},
    {"prompt": "Hi", "chosen": " Hello there", "rejected": " What do you want from me?"},
    {"prompt": "Is it far from the old station?", "chosen": " Five minutes.", "rejected": " Yes."},
]


def config(kind: Any, folder: Path, **options: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=len(ROWS),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def disturb(model: torch.nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module")
def dpo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=str(tiny_model),
        args=config(DPOConfig, tmp_path_factory.mktemp("dpo"), beta=0.3),
        train_dataset=Dataset.from_list(ROWS),
    )
    disturb(trainer.model, 0.02)
    return trainer


def completion_logprobs(model: Any, row: dict[str, list[int]], side: str) -> Tensor:
    prompt, completion = row["prompt_ids"], row[f"{side}_ids"]
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logprobs[places, ids[0, len(prompt) :]]


def ld_weights(count: int, shared: int, alpha: float) -> Tensor:
    """LD-DPO's weight of each token (arXiv 2409.06411): 1 up to the shared length, then alpha."""
    return torch.where(torch.arange(count) < shared, 1.0, alpha)


def measure(trainer: Any, alpha: float = 1.0) -> PairLogps:
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    found: dict[str, list[Tensor]] = {}
    for row in rows:
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in ("chosen", "rejected"):
            for model, name in ((trainer.model, "policy"), (trainer.ref_model, "ref")):
                logprobs = completion_logprobs(model, row, side)
                weights = ld_weights(len(logprobs), shared, alpha)
                found.setdefault(f"{name}_{side}", []).append((weights * logprobs).sum())
            found.setdefault(f"{side}_lengths", []).append(torch.tensor(len(row[f"{side}_ids"])))
    return PairLogps(**{name: torch.stack(values) for name, values in found.items()})


def trl_loss(trainer: Any, kind: str, **settings: Any) -> float:
    trainer.loss_types, trainer.loss_weights = [kind], [1.0]
    trainer.label_smoothing, trainer.ld_alpha = 0.0, None
    for name, value in settings.items():
        setattr(trainer, name, value)
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    return float(trainer.compute_loss(trainer.model, batch).item())


def test_dpo_sigmoid(dpo: Any) -> None:
    h = losses.implicit_rewards(measure(dpo), beta=0.3).differences
    assert h.std() > 0.1  # the policy did move: this is not log 2 everywhere
    ours = losses.weighted_mean(losses.bradley_terry_loss(h)).item()
    assert ours == pytest.approx(trl_loss(dpo, "sigmoid"), rel=1e-5)


def test_dpo_robust(dpo: Any) -> None:
    h = losses.implicit_rewards(measure(dpo), beta=0.3).differences
    ours = losses.weighted_mean(losses.robust_loss(h, flip=0.2)).item()
    assert ours == pytest.approx(trl_loss(dpo, "robust", label_smoothing=0.2), rel=1e-5)


def test_dpo_ipo_averaged(dpo: Any) -> None:
    ours = losses.weighted_mean(losses.ipo_loss(measure(dpo), beta=0.3, averaged=True)).item()
    assert ours == pytest.approx(trl_loss(dpo, "ipo"), rel=1e-5)


def test_ld_dpo(dpo: Any) -> None:
    h = losses.implicit_rewards(measure(dpo, alpha=0.4), beta=0.3).differences
    ours = losses.weighted_mean(losses.bradley_terry_loss(h)).item()
    assert ours == pytest.approx(trl_loss(dpo, "sigmoid", ld_alpha=0.4), rel=1e-5)


def test_nll_term(dpo: Any) -> None:
    """TRL's ``sft`` is a mean over all chosen tokens of the batch: ours weighted by length."""
    pair = measure(dpo)
    nll = losses.nll_loss(pair.policy_chosen, pair.chosen_lengths)
    ours = losses.weighted_mean(nll, pair.chosen_lengths).item()
    assert ours == pytest.approx(trl_loss(dpo, "sft"), rel=1e-5)


def test_simpo(dpo: Any, tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    options = {"loss_type": "simpo", "simpo_gamma": 0.4, "cpo_alpha": 0.0, "beta": 2.0}
    trainer = CPOTrainer(
        model=dpo.model,
        args=config(CPOConfig, tmp_path, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = float(trainer.compute_loss(trainer.model, batch).item())
    ours = losses.weighted_mean(losses.simpo_loss(measure(dpo), beta=2.0, gamma=0.4)).item()
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.05])
def test_reward_loss(
    tiny_model: Path, tmp_path: Path, margin: bool, centring: float | None
) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    margins = [0.3, 1.0, 0.0, 0.6]
    rows = [row | ({"margin": m} if margin else {}) for row, m in zip(ROWS, margins, strict=True)]
    torch.manual_seed(3)
    trainer = RewardTrainer(
        model=str(tiny_model),
        args=config(RewardConfig, tmp_path, center_rewards_coefficient=centring),
        train_dataset=Dataset.from_list(rows),
    )
    disturb(trainer.model, 0.05)
    tokenised = [trainer.train_dataset[i] for i in range(len(rows))]
    batch = trainer._prepare_inputs(trainer.data_collator(tokenised))
    theirs = float(trainer.compute_loss(trainer.model, batch).item())

    scores = {}
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            ids = [torch.tensor([row[f"{side}_ids"]]) for row in tokenised]
            scores[side] = torch.cat([trainer.model(input_ids=i).logits[:, 0] for i in ids])
    d = scores["chosen"] - scores["rejected"]
    ours = losses.bradley_terry_loss(d, margin=torch.tensor(margins) if margin else None)
    if centring is not None:
        ours = ours + centring * losses.centring_loss(scores["chosen"], scores["rejected"])
    assert losses.weighted_mean(ours).item() == pytest.approx(theirs, rel=1e-5)
