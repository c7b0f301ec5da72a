"""PPO's loop on a tiny model: one update against an independent one, resuming, guards, options."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.errors import BackendError, InputError, RecipeError, RlaifError
from train import identity, ppo, ppo_results, ppo_state
from train.advantages import gae, kl_terms, masked_whiten, shape_rewards
from train.identity import file_identity, model_identity
from train.ppo_config import GuardOptions, PpoOptions, RewardSource
from train.ppo_setup import prompts_of_step, seeds_of_step, set_up

VOLATILE = ("time/", "memory/")
CALLS: list[int] = []


class Crash(BaseException):
    """Stands for kill -9: nothing in the code catches it."""


def letters(prompts: list[Any], completions: list[str]) -> list[float]:
    """A reward that anything can learn: how many a and e."""
    return [float(min(text.count("a") + text.count("e"), 6)) for text in completions]


def length_hack(prompts: list[Any], completions: list[str]) -> list[float]:
    return [len(text.encode()) / 4 for text in completions]


def gold_short(prompts: list[Any], completions: list[str]) -> list[float]:
    return [-len(text.encode()) / 4 for text in completions]


def letters_too(prompts: list[Any], completions: list[str]) -> list[float]:
    return letters(prompts, completions)


def sometimes(prompts: list[Any], completions: list[str]) -> list[float | None]:
    scores = letters(prompts, completions)
    return [None if place % 3 == 0 else score for place, score in enumerate(scores)]


def infinite_at_last(prompts: list[Any], completions: list[str]) -> list[float]:
    """Finite in every other call."""
    CALLS.append(len(completions))
    return [math.inf if len(CALLS) % 2 == 0 else 1.0] * len(completions)


def never(prompts: list[Any], completions: list[str]) -> list[float | None]:
    return [None] * len(completions)


def function(name: str) -> RewardSource:
    return RewardSource(kind="function", function=f"tests.test_ppo:{name}")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["hello", "what is it", "say a word", "count to ten", "why", "name a colour", "go on"]
    rows = [{"prompt_id": f"p{place}", "prompt": text} for place, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tiny_model: Path, prompts: str, tmp_path: Path) -> Callable[..., PpoOptions]:
    def make(**changes: Any) -> PpoOptions:
        values: dict[str, Any] = {
            "prompts": (prompts,),
            "output": tmp_path / "out",
            "reward": function("letters"),
            "model": str(tiny_model),
            "steps": 3,
            "prompts_per_step": 4,
            "completions_per_prompt": 2,
            "max_tokens": 6,
            "learning_rate": 2e-3,
            "ppo_epochs": 2,
            "minibatches": 2,
            "missing_eos_penalty": 0.5,
            "max_prompt_tokens": 30,
            "device": "cpu",
        }
        return PpoOptions(**{**values, **changes})

    return make


def trace(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(VOLATILE)}
        for row in rows
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_weights(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# --- the arithmetic of a whole update


def plain_scores(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def plain_values(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    hidden = model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return model.score(hidden)[:, 0]


def test_one_step_equals_an_unpacked_one_written_out(
    options: Callable[..., PpoOptions], tiny_model: Path
) -> None:
    """One rollout and one update: the same weights as sequence by sequence with plain AdamW."""
    from transformers import AutoModelForCausalLM

    chosen = options(
        steps=1, ppo_epochs=1, minibatches=1, max_grad_norm=0.0, kl_coef=0.3, row_tokens=60
    )
    this = set_up(chosen)
    rollout = ppo.roll_out(this, 0)
    shaped = ppo.shape(this, rollout)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():  # away from the reference, so that the KL is not 0
        for one, two in zip(
            policy.parameters(), this.networks.module.policy.parameters(), strict=True
        ):
            noise = 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3))
            one += noise
            two += noise
        value_model = this.networks.module.value_model
        value_model.score.weight.normal_(generator=torch.Generator().manual_seed(4))
    rollout = ppo.roll_out(this, 0)
    shaped = ppo.shape(this, rollout)
    sequences = [
        (list(group.prompt_ids), list(ids)) for group in rollout.groups for ids in group.completions
    ]
    # The same by hand, one sequence after the other.
    width = rollout.mask.shape[1]

    def padded(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

    old = padded([plain_scores(policy, *pair) for pair in sequences])
    values = padded([plain_values(value_model, *pair) for pair in sequences])
    reference = padded([plain_scores(this.networks.reference, *pair) for pair in sequences])
    mask = padded([torch.ones(len(completion)) for _, completion in sequences]).bool()
    texts = [this.networks.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in sequences]
    scores = torch.tensor(letters([], texts))
    scores -= 0.5 * torch.tensor([ids[-1] != 1 for _, ids in sequences]).float()
    rewards = shape_rewards(scores, kl_terms(old, reference, mask), mask, kl_coef=0.3).detach()
    advantages, returns = gae(rewards, values.detach(), mask)
    advantages = masked_whiten(advantages, mask)
    torch.testing.assert_close(shaped.advantages, advantages, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shaped.returns, returns, atol=1e-4, rtol=1e-4)
    # At the rollout's own policy the ratio is 1: the losses are -A and (V - R)^2 / 2.
    count = mask.sum()
    policy_loss = -(torch.exp(old - old.detach()) * advantages)[mask].sum() / count
    value_loss = 0.5 * ((values - returns) ** 2)[mask].sum() / count
    (policy_loss + 0.1 * value_loss).backward()
    settings: dict[str, Any] = {"lr": 2e-3, "eps": 1e-5, "weight_decay": 0.0}
    torch.optim.AdamW(policy.parameters(), **settings).step()
    wanted_value = [p.grad.clone() for p in value_model.parameters() if p.grad is not None]
    value_model.zero_grad()
    statistic = ppo.update(this, rollout, shaped, range(len(rollout.groups)), share=1.0)
    assert statistic["policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-5)
    assert statistic["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in wanted_value))
    assert statistic["value_norm"] == pytest.approx(norm, rel=1e-3)
    found = dict(this.networks.module.policy.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("row_tokens", [60, 4000])
def test_how_a_minibatch_is_packed_changes_nothing(
    options: Callable[..., PpoOptions], row_tokens: int
) -> None:
    this = set_up(options(row_tokens=row_tokens))
    rollout = ppo.roll_out(this, 0)
    rows = list(this.maker.rows(rollout.groups, range(4)))
    assert (len(rows) > 1) == (row_tokens == 60)
    statistic = ppo.update(this, rollout, ppo.shape(this, rollout), range(4), share=1.0)
    assert statistic["ratio"] == pytest.approx(1.0, abs=1e-5)
    # The same loss and gradient norms whatever the rows: both cases must meet these numbers.
    reference = set_up(options(row_tokens=1000))
    again = ppo.roll_out(reference, 0)
    wanted = ppo.update(reference, again, ppo.shape(reference, again), range(4), share=1.0)
    for name, value in wanted.items():
        assert statistic[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("changes", [{}, {"value": "shared", "lora_rank": 4}])
def test_gradient_checkpointing_recomputes_and_changes_nothing(
    changes: dict[str, Any], options: Callable[..., PpoOptions]
) -> None:
    found = []
    for checkpointing in (False, True):
        this = set_up(options(gradient_checkpointing=checkpointing, **changes))
        counts = _count_recomputed(this)
        rollout = ppo.roll_out(this, 0)
        counts.clear()
        statistic = ppo.update(this, rollout, ppo.shape(this, rollout), range(4), share=1.0)
        found.append((statistic, dict(counts)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-7)
    networks = {"policy"} if changes else {"policy", "value_model"}
    assert not found[0][1]
    assert found[1][1].keys() == networks
    assert all(count % 2 == 0 for count in found[1][1].values())  # both layers, row by row


def _count_recomputed(this: Any) -> Counter[str]:
    """Count the layers that are run under checkpointing, by network."""
    counts: Counter[str] = Counter()

    def counted(network: str, original: Callable[..., Any], *parts: Any, **more: Any) -> Any:
        counts[network] += 1
        return original(*parts, **more)

    for name, module in this.networks.module.named_modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "self_attn"):
            module._gradient_checkpointing_func = functools.partial(
                counted, name.partition(".")[0], module._gradient_checkpointing_func
            )
    return counts


def test_sampler_and_trainer_agree_and_stale_weights_are_caught(
    options: Callable[..., PpoOptions],
) -> None:
    this = set_up(options(temperature=0.7))
    rollout = ppo.roll_out(this, 0)
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs().max()
    assert gap < 1e-4
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs)
    stale = set_up(options(temperature=0.7)).networks.module.policy
    this.sampler.sync = lambda policy: None  # type: ignore[method-assign]
    this.sampler.model = stale  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in this.networks.module.policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    with pytest.raises(RlaifError, match="weights are not the policy's"):
        ppo.roll_out(this, 1)


# --- stopping and resuming


@pytest.fixture(scope="module")
def whole(
    tiny_model: Path, prompts: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run that nobody disturbed, and its options."""
    values: dict[str, Any] = {
        "prompts": (prompts,),
        "reward": function("letters"),
        "guard": GuardOptions(gold=function("gold_short"), every=2, prompt_count=2, patience=9),
        "model": str(tiny_model),
        "steps": 4,
        "prompts_per_step": 3,
        "completions_per_prompt": 2,
        "max_tokens": 6,
        "learning_rate": 2e-3,
        "ppo_epochs": 2,
        "minibatches": 2,
        "kl_target": 0.5,
        "kl_horizon": 50,
        "normalise_rewards": "running",
        "save_every": 1,
        "device": "cpu",
    }
    folder = tmp_path_factory.mktemp("whole") / "out"
    ppo.train(PpoOptions(output=folder, **values))
    return folder, values


def crash_at(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1, 1000))

    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            raise Crash
        return original(*arguments, **keywords)

    return call


@pytest.mark.parametrize("where", ["mid-rollout", "mid-epoch", "mid-save", "in the guard's probe"])
def test_a_killed_run_resumes_to_the_same_trace(
    where: str, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    folder, values = whole
    options = PpoOptions(output=tmp_path / "out", **values)

    def torn_save(state: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise Crash

    with monkeypatch.context() as patch:
        if where == "mid-rollout":
            patch.setattr(ppo, "recompute", crash_at(4, ppo.recompute))
        elif where == "mid-epoch":
            patch.setattr(ppo, "update", crash_at(7, ppo.update))
        elif where == "mid-save":
            saves = iter(range(1, 1000))
            save = torch.save
            patch.setattr(
                ppo_state.torch,
                "save",
                lambda state, file: (torn_save if next(saves) == 4 else save)(state, file),
            )
        else:
            patch.setattr(ppo, "probe", crash_at(2, ppo.probe))
        with pytest.raises(Crash):
            ppo.train(options)
    assert not (options.output / "training.json").exists()
    assert 0 < len(trace(options.output)) < 4
    ppo.train(options)
    assert trace(options.output) == trace(folder)
    curves = [(path / "guard.jsonl").read_text() for path in (options.output, folder)]
    assert curves[0] == curves[1]
    assert same_weights(options.output, folder)


@pytest.mark.parametrize("call", [2, 7])
def test_a_stopped_run_saves_in_the_middle_and_resumes_to_the_same_trace(
    call: int, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    """SIGTERM in the middle of a step: the rollout and the updates done so far are not lost."""
    folder, values = whole
    options = PpoOptions(output=tmp_path / "out", **{**values, "save_every": 0})
    update, calls = ppo.update, iter(range(1, 1000))

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments, **keywords)

    rolled: list[int] = []
    roll_out = ppo.roll_out
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(options)
    saved = ppo_state.load_checkpoint(options.output / "checkpoints")
    assert saved is not None
    done = saved["progress"]
    assert done["step"] * 4 + done["updates"] == call
    assert done["rollouts"]

    def counted(this: Any, step: int) -> Any:
        rolled.append(step)
        return roll_out(this, step)

    newest = max((options.output / "checkpoints").glob("step-*.pt"))
    torch.save({**saved, "seconds": 1000.0}, newest)
    monkeypatch.setattr(ppo, "roll_out", counted)
    trained = ppo.train(options)
    assert trained.figures["seconds"] > 1000.0  # both starts together
    assert rolled == list(range(done["step"] + 1, 4))  # the saved rollout was not sampled again
    assert trace(options.output) == trace(folder)
    assert same_weights(options.output, folder)


WORKERS = """
import os, shutil, signal, sys
from pathlib import Path
from accelerate import PartialState
from tests.test_ppo import function
from train import ppo
from train.ppo_config import GuardOptions, PpoOptions

folder, model, prompts = map(Path, sys.argv[1:])
guard = GuardOptions(gold=function("gold_short"), every=2, prompt_count=3)

def options(name):
    return PpoOptions(
        prompts=(str(prompts),), output=folder / name, model=str(model), steps=2, max_tokens=6,
        prompts_per_step=4, completions_per_prompt=2, ppo_epochs=2, learning_rate=2e-3,
        reward=function("letters"), guard=guard, device="cpu",
    )

ppo.train(options("whole"))
update, calls = ppo.update, iter(range(9))

def interrupted(*arguments, **keywords):
    if next(calls) == 0 and PartialState().is_main_process:  # one process is asked, both stop
        os.kill(os.getpid(), signal.SIGTERM)
    return update(*arguments, **keywords)

ppo.update = interrupted
try:
    ppo.train(options("cut"))
except KeyboardInterrupt:
    pass
ppo.update = update
if PartialState().is_main_process:
    shutil.copytree(folder / "cut", folder / "alone")
PartialState().wait_for_everyone()
ppo.train(options("cut"))
"""


def test_two_processes_stop_and_continue_together(
    tiny_model: Path, prompts: str, tmp_path: Path, root: Path
) -> None:
    """Each has its part of the saved rollout; one process alone would lose the other's."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
        *(str(script), str(tmp_path), str(tiny_model), prompts),
    ]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["completions"] for row in trace(tmp_path / "whole")] == [8.0, 8.0]
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(InputError, match="2 processes, and this one has 1"):
        ppo.train(
            PpoOptions(
                prompts=(prompts,), output=tmp_path / "alone", model=str(tiny_model), steps=2,
                max_tokens=6, prompts_per_step=4, completions_per_prompt=2, ppo_epochs=2,
                learning_rate=2e-3, reward=function("letters"), device="cpu",
                guard=GuardOptions(gold=function("gold_short"), every=2, prompt_count=3),
            )
        )  # fmt: skip


def test_a_finished_run_is_not_run_again(
    options: Callable[..., PpoOptions], monkeypatch: Any
) -> None:
    chosen = options(steps=1)
    first = ppo.train(chosen)
    monkeypatch.setattr(ppo, "set_up", crash_at(1, ppo.set_up))
    again = ppo.train(chosen)
    assert again.figures == first.figures
    assert "complete already" in again.line


@pytest.mark.parametrize("changes", [{"value_model": "the policy"}, {"lora_rank": 4}])
def test_fresh_runs_of_one_seed_are_the_same_to_the_last_bit(
    changes: dict[str, Any], options: Callable[..., PpoOptions], tiny_model: Path
) -> None:
    """Weights that no file holds, a value head and adapters, come from the seed or are zeros."""
    if "value_model" in changes:
        changes = {"value_model": str(tiny_model)}
    traces = []
    for turn in range(2):
        torch.manual_seed(100 + turn)  # as two processes, which start in states of their own
        chosen = options(**changes, steps=2, output=options().output / str(turn))
        ppo.train(chosen)
        traces.append(trace(chosen.output))
    assert traces[0] == traces[1]


def test_a_value_model_without_a_head_starts_from_zeros(
    options: Callable[..., PpoOptions], tiny_model: Path
) -> None:
    this = set_up(options(value_model=str(tiny_model)))
    assert not this.networks.module.value_model.score.weight.any()
    one, two = (set_up(options(lora_rank=4, seed=seed)).networks.module.policy for seed in (0, 1))
    drawn = [
        torch.cat([p.flatten() for name, p in policy.named_parameters() if "lora_A" in name])
        for policy in (one, two)
    ]
    assert not torch.equal(*drawn)  # another seed is another draw


def test_checkpoints_of_another_run_are_refused(options: Callable[..., PpoOptions]) -> None:
    ppo.train(options(steps=1, save_every=1))
    with pytest.raises(InputError, match=r"another run \(kl_coef differ\)"):
        ppo.train(options(steps=1, save_every=1, kl_coef=0.2))
    ppo.train(options(steps=1, save_every=1, kl_coef=0.2, resume=False))


def test_what_a_run_names_is_known_by_its_content(
    options: Callable[..., PpoOptions], tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Edited prompts of the same size, a changed function, other weights: another run each time."""
    prompts, code, model = tmp_path / "some.jsonl", tmp_path / "scoring_here.py", tmp_path / "model"
    prompts.write_text("".join(f'{{"prompt_id": "{n}", "prompt": "ask {n}"}}\n' for n in range(4)))
    code.write_text("def score(prompts, texts):\n    return [float(len(t)) for t in texts]\n")
    shutil.copytree(tiny_model, model)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = options(
        prompts=(str(prompts),), model=str(model), steps=1, save_every=1,
        reward=RewardSource(kind="function", function="scoring_here:score"),
    )  # fmt: skip
    ppo.train(chosen)
    assert "complete already" in ppo.train(chosen).line
    text, source = prompts.read_text(), code.read_text()
    prompts.write_text(text.replace("ask 3", "say 3"))
    with pytest.raises(InputError, match=r"\(prompt_files differ\)"):
        ppo.train(chosen)
    prompts.write_text(text)
    code.write_text(source.replace("len(t)", "-len(t)"))
    with pytest.raises(InputError, match=r"\(reward_files differ\)"):
        ppo.train(chosen)
    code.write_text(source)
    _talks_little(tiny_model, model)
    with pytest.raises(InputError, match=r"\(policy_files differ\)"):
        ppo.train(chosen)


def test_a_reward_model_that_was_trained_again_is_another_one(tmp_path: Path) -> None:
    """Also inside an ensemble; what lies beside it does not count."""
    from safetensors.torch import save_file

    for member in ("a", "b"):
        (tmp_path / member).mkdir()
        save_file({"score.weight": torch.ones(1, 4)}, tmp_path / member / "model.safetensors")
    (tmp_path / "ensemble.json").write_text('{"members": ["a", "b"]}')
    before = model_identity(str(tmp_path))
    (tmp_path / "a" / "README.md").write_text("a card")
    assert model_identity(str(tmp_path)) == before
    save_file({"score.weight": torch.zeros(1, 4)}, tmp_path / "b" / "model.safetensors")
    assert model_identity(str(tmp_path)) != before
    assert model_identity("someone/on-the-hub") is None


def test_large_files_are_known_by_their_size_and_pieces(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(identity, "_WHOLE", 1000)
    monkeypatch.setattr(identity, "_PIECE", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(5000))
    before = file_identity(path)
    for place in (0, 4999):
        path.write_bytes(bytes(place) + b"x" + bytes(4999 - place))
        assert file_identity(path) != before
    path.write_bytes(bytes(5001))
    assert file_identity(path) != before
    path.write_bytes(bytes(5000))
    assert file_identity(path) == before


# --- rewards


def test_samples_without_a_score_cost_themselves_and_nothing_else(
    options: Callable[..., PpoOptions],
) -> None:
    """What the third without a score contains does not reach the update."""
    this = set_up(options(reward=function("sometimes")))
    rollout = ppo.roll_out(this, 0)
    assert rollout.failed == 3
    lost = rollout.scores.isnan()
    assert not rollout.mask[lost].any()
    shaped = ppo.shape(this, rollout)
    assert not shaped.advantages[lost].any()
    assert not shaped.returns[lost].any()
    changed = rollout._replace(
        values=torch.where(lost[:, None], 1e3, rollout.values),
        ref_logprobs=torch.where(lost[:, None], -50.0, rollout.ref_logprobs),
    )
    again = ppo.shape(this, changed)
    for name in ("advantages", "returns", "kl", "scores"):
        torch.testing.assert_close(getattr(again, name), getattr(shaped, name))
    alone = ppo.update(this, rollout, shaped, range(4), share=0.0)
    assert math.isfinite(alone["policy_loss"])
    trained = ppo.train(options(reward=function("sometimes"), output=this.options.output / "run"))
    assert trained.figures["failed_share"] == pytest.approx(3 / 8)


def test_a_reward_that_never_answers_stops_the_run(options: Callable[..., PpoOptions]) -> None:
    with pytest.raises(BackendError, match="no score for any completion"):
        ppo.train(options(reward=function("never")))


def test_reward_functions_that_do_not_exist(options: Callable[..., PpoOptions]) -> None:
    with pytest.raises(RecipeError, match="cannot import 'nowhere'"):
        ppo.train(options(reward=RewardSource(kind="function", function="nowhere:f")))
    with pytest.raises(RecipeError, match="no function 'g'"):
        ppo.train(options(reward=RewardSource(kind="function", function="tests.test_ppo:g")))


# --- inputs that do not fit


def test_inputs_that_no_step_could_use_are_found_before_the_first(
    options: Callable[..., PpoOptions], tiny_model: Path, tmp_path: Path, caplog: Any
) -> None:
    from transformers import AutoConfig

    short = tmp_path / "short"
    shutil.copytree(tiny_model, short)
    config = AutoConfig.from_pretrained(short)
    config.max_position_embeddings = 20
    config.save_pretrained(short)
    with pytest.raises(InputError, match=r"2 of 7 prompts .* policy's context of 20 tokens"):
        set_up(options(model=str(short)))
    assert set_up(options(model=str(short), max_tokens=4))
    with pytest.raises(InputError, match=r"the value model's context .*'count to ten'"):
        set_up(options(value_model=str(short)))
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    text = json.loads((other / "tokenizer.json").read_text())
    words = text["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match="its tokenizer gives them other ids"):
        set_up(options(value_model=str(other)))
    assert len(set_up(options(max_prompt_tokens=12)).prompts) < 7
    assert "prompts: 4 of 7 are longer than max_prompt_tokens (12) and left out" in caplog.text


def test_vllm_with_a_nucleus_is_warned_about(
    options: Callable[..., PpoOptions], monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr("train.vllm_sampler.VllmSampler", lambda policy, **settings: settings)
    set_up(options(sampler="vllm"))
    assert not caplog.text
    set_up(options(sampler="vllm", top_p=0.5))
    assert "within the nucleus of top_p (0.5)" in caplog.text


def test_a_guard_that_watches_its_own_reward_is_warned_about(
    options: Callable[..., PpoOptions], prompts: str, caplog: Any
) -> None:
    set_up(options(guard=GuardOptions(gold=function("gold_short"), prompt_count=2)))
    assert not caplog.text
    guard = GuardOptions(gold=function("letters"), prompts=(prompts,), prompt_count=5)
    set_up(options(guard=guard))
    assert "guard.gold is the reward itself" in caplog.text
    assert "5 of the guard's 5 prompts are trained on too" in caplog.text


def test_a_loss_that_is_no_number_says_what_is_saved(options: Callable[..., PpoOptions]) -> None:
    for save_every, words in (
        (0, r"no checkpoint was saved \(save_every is 0\)"), (1, "the last checkpoint is intact"),
    ):  # fmt: skip
        chosen = options(save_every=save_every, output=options().output / words[:2])
        with pytest.raises(RlaifError, match=words):
            ppo.train(PpoOptions(**{**_fields(chosen), "reward": function("infinite_at_last")}))


# --- learning, and what bounds it


def test_the_score_rises(options: Callable[..., PpoOptions]) -> None:
    chosen = options(
        steps=12,
        prompts_per_step=7,
        completions_per_prompt=6,
        learning_rate=5e-3,
        kl_coef=0.0,
        missing_eos_penalty=None,
        critic_warmup=1,
    )
    trained = ppo.train(chosen)
    scores = [row["objective/scores"] for row in trace(chosen.output)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5
    assert trained.figures["kl"] > 0.5


def test_a_length_hack_trips_the_guard_and_ends_at_the_gold_best(
    options: Callable[..., PpoOptions],
) -> None:
    """The reward likes length, gold dislikes it: the run stops early and keeps what gold liked."""
    chosen = options(
        steps=40,
        prompts_per_step=4,
        completions_per_prompt=6,
        max_tokens=16,
        learning_rate=8e-3,
        kl_coef=0.0,
        missing_eos_penalty=None,
        reward=function("length_hack"),
        guard=GuardOptions(
            gold=function("gold_short"), every=2, prompt_count=3, completions=4, patience=2
        ),
    )
    # A start that often stops early, so that there is length to gain.
    model = chosen.output.parent / "short"
    _talks_little(Path(chosen.model), model)
    chosen = PpoOptions(**{**_fields(chosen), "model": str(model)})
    trained = ppo.train(chosen)
    probes = [json.loads(line) for line in (chosen.output / "guard.jsonl").read_text().splitlines()]
    best = max(probes, key=lambda probe: probe["gold"])
    assert trained.figures["steps"] < 40
    assert "the gold score has fallen" in trained.line
    assert [probe["outcome"] for probe in probes[-2:]] == ["worse", "worse"]
    assert probes[-1]["reward"] > probes[0]["reward"]  # the proxy rose while gold fell
    assert trained.figures["best_step"] == best["step"] < probes[-1]["step"]
    # The saved policy is the best probe's: probing it again gives the same gold score.
    reloaded = PpoOptions(
        **{**_fields(chosen), "model": str(chosen.output), "output": chosen.output / "again"}
    )
    this = set_up(reloaded)
    from train.ppo_store import RunStore

    this.options.output.mkdir()
    assert ppo.probe(this, RunStore(this), step=0).gold == pytest.approx(best["gold"], abs=1e-6)


def test_the_last_step_is_probed(options: Callable[..., PpoOptions]) -> None:
    """Five steps, a probe every ten: the trained policy is looked at all the same, and kept."""
    chosen = options(
        steps=5, learning_rate=5e-3, kl_coef=0.0, missing_eos_penalty=None,
        prompts_per_step=5, completions_per_prompt=6,
        guard=GuardOptions(gold=function("letters_too"), prompt_count=2, completions=12),
    )  # fmt: skip
    trained = ppo.train(chosen)
    assert probed_at(chosen.output) == [0, 5]
    assert trained.figures["best_step"] == 5
    bounded = options(**{**_changed(chosen), "max_kl": 1e-9, "output": chosen.output / "bounded"})
    assert ppo.train(bounded).figures["steps"] < 5
    assert probed_at(bounded.output) == [0, trace(bounded.output)[-1]["step"]]


def probed_at(folder: Path) -> list[int]:
    return [json.loads(row)["step"] for row in (folder / "guard.jsonl").read_text().splitlines()]


def _changed(options: PpoOptions) -> dict[str, Any]:
    return {name: value for name, value in _fields(options).items() if name != "output"}


def test_a_gold_scorer_that_never_answers_stops_the_run_before_its_first_step(
    options: Callable[..., PpoOptions],
) -> None:
    chosen = options(guard=GuardOptions(gold=function("never"), prompt_count=2))
    with pytest.raises(BackendError, match="scored 0 of 2 prompts before the first step"):
        ppo.train(chosen)


def test_a_run_killed_before_its_record_is_written_finishes(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    folder, values = whole
    options = PpoOptions(output=tmp_path / "out", **values)
    with monkeypatch.context() as patch:
        patch.setattr(ppo_results, "write_json", crash_at(1, ppo_results.write_json))
        with pytest.raises(Crash):
            ppo.train(options)
    ppo.train(options)
    assert same_weights(options.output, folder)
    assert not list(options.output.glob("best-*.pt"))


def _fields(options: PpoOptions) -> dict[str, Any]:
    import dataclasses

    return {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}


def _talks_little(source: Path, target: Path) -> None:
    """Save a copy of the tiny model whose end token is likely."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight *= 2.0
        ids = torch.arange(5, 40)[None]
        hidden = model.model(ids).last_hidden_state[0].mean(0)
        weight[1] += 2.2 * hidden / hidden.norm() ** 2
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def test_critic_warm_up_leaves_the_policy_alone(options: Callable[..., PpoOptions]) -> None:
    for value in ("separate", "shared"):
        this = set_up(options(value=value))
        rollout = ppo.roll_out(this, 0)
        before = {name: p.clone() for name, p in this.networks.module.named_parameters()}
        shaped = ppo.shape(this, rollout)
        ppo.update(this, rollout, shaped, range(4), share=1.0, values_only=True)
        changed = {
            name
            for name, p in this.networks.module.named_parameters()
            if not torch.equal(p, before[name])
        }
        assert changed
        assert not [name for name in changed if name.startswith("policy")]


def test_copies_of_the_policy_are_kept(options: Callable[..., PpoOptions]) -> None:
    chosen = options(copy_every=2, steps=3)
    ppo.train(chosen)
    assert [path.name for path in (chosen.output / "policies").iterdir()] == ["step-000002"]
    copy = chosen.output / "policies" / "step-000002"
    assert not same_weights(copy, chosen.output)
    ppo.train(options(steps=2, output=chosen.output / "two", schedule="constant"))
    whole = options(copy_every=2, steps=3, schedule="constant", output=chosen.output / "three")
    ppo.train(whole)
    assert same_weights(whole.output / "policies" / "step-000002", chosen.output / "two")


def test_early_stops(options: Callable[..., PpoOptions], tmp_path: Path) -> None:
    """stop_kl ends a rollout's passes, max_kl the run."""
    few = options(stop_kl=1e-9, output=tmp_path / "few")
    ppo.train(few)
    assert [row["val/updates"] for row in trace(few.output)] == [2.0, 2.0, 2.0]
    bounded = options(steps=20, learning_rate=2e-2, max_kl=0.5, kl_coef=0.0)
    trained = ppo.train(bounded)
    assert trained.figures["steps"] < 20
    assert "the KL to the reference exceeds" in trained.line


def test_adapters_share_the_weights_with_the_reference(
    options: Callable[..., PpoOptions],
) -> None:
    chosen = options(lora_rank=4, value="shared", learning_rate=1e-2)
    this = set_up(chosen)
    assert this.networks.reference is None
    assert this.networks.models_held == 1
    rollout = ppo.roll_out(this, 0)
    start = rollout.ref_logprobs
    torch.testing.assert_close(rollout.logprobs, start)
    for _ in range(3):
        ppo.update(this, rollout, ppo.shape(this, rollout), range(4), share=1.0)
    again = ppo._recompute(this, rollout)
    assert not torch.allclose(again.logprobs, start, atol=1e-3)
    torch.testing.assert_close(again.ref_logprobs, start)
    ppo.train(chosen)
    assert (chosen.output / "adapter_model.safetensors").is_file()


def test_every_pass_over_the_prompts_has_its_own_order(
    options: Callable[..., PpoOptions],
) -> None:
    """7 prompts, 4 per step: steps 0 to 6 hold each prompt 4 times; seeds never repeat."""
    this = set_up(options())
    names = [item.prompt_id for step in range(7) for item in prompts_of_step(this, step)]
    assert all(names.count(f"p{place}") == 4 for place in range(7))
    assert names[:7] != names[7:14]
    seeds = [seed for step in range(7) for seed in seeds_of_step(this, step, 4)]
    assert len(set(seeds)) == 28


def test_wrong_options_name_the_way_out(options: Callable[..., PpoOptions]) -> None:
    with pytest.raises(RecipeError, match=r"set reward\.kind"):
        ppo.train(options(reward=RewardSource()))
    for changes, message in (
        ({"minibatches": 9}, "between 1 and prompts_per_step"),
        ({"temperature": 0.0}, "above 0"),
        ({"dual_clip": 0.5}, "above 1"),
        ({"value": "shared", "value_model": "x"}, "remove value_model"),
        ({"reward_clip": 5.0}, "set normalise_rewards"),
        ({"lora_rank": 4, "reference_model": "x"}, "remove reference_model"),
        ({"missing_eos_score": -1.0}, "keep one"),
        ({"steps": 0}, "at least 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            options(**changes)
    for changes, message in (
        ({"kind": "model"}, "name a reward model"),
        ({"kind": "function"}, "package.module:function"),
        ({"kind": "judge", "models": ("x",)}, "does nothing"),
        ({"kind": "model", "models": ("x",), "ensemble": "min"}, "at least two"),
    ):
        with pytest.raises(RecipeError, match=message):
            RewardSource(**changes)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="prompt_count >= 2"):
        GuardOptions(prompt_count=1)
    with pytest.raises(RecipeError, match="leave none to train on"):
        ppo.train(options(guard=GuardOptions(gold=function("letters"), prompt_count=7)))


def test_prompts_are_read_as_sample_reads_them(
    options: Callable[..., PpoOptions], tmp_path: Path
) -> None:
    """Without an id, the id is a hash of the prompt; a wrong row is named with its line."""
    bare, wrong = tmp_path / "bare.jsonl", tmp_path / "wrong.jsonl"
    bare.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(5)))
    wrong.write_text('{"prompt": "say it"}\n{"prompts": "say it"}\n')
    found = set_up(options(prompts=(str(bare),))).prompts
    assert len({item.prompt_id for item in found}) == 5
    with pytest.raises(InputError, match=r"wrong\.jsonl:2: .*no \"prompt\""):
        set_up(options(prompts=(str(wrong),), output=tmp_path / "other"))
