"""Options of PPO and direct RLAIF: frozen dataclasses, help text under each field, no torch.

A ``RewardSource`` says where scores come from: a reward model, several of them, the judge itself,
or a Python function. PPO has two, the reward that it maximises and the gold scorer that guards it.
Wrong combinations are errors when the options are built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from feedback.config import EngineOptions
from feedback.errors import RecipeError
from train.config import TrainOptions

__all__ = ["GuardOptions", "PpoOptions", "RewardSource"]


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """Where scores of completions come from."""

    kind: Literal["none", "model", "judge", "function"] = "none"
    """model: one reward model or several; judge: a judge's expected rating, or its comparison with
    each prompt's gold answer; function: Python."""
    models: tuple[str, ...] = ()
    """Reward model folders or names; each reads text through its own tokenizer."""
    ensemble: Literal["mean", "min", "uwo"] = "mean"
    """How several reward models make one score: their mean, the worst, or the mean less
    uwo_weight times their variance."""
    uwo_weight: float = 0.5
    """Weight of the ensemble's variance in uwo."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of reward models; auto: bfloat16 on CUDA, float32 on CPU. bfloat16 moves scores by about 1%
    of their spread."""
    judge: EngineOptions = field(default_factory=EngineOptions)
    """The judge's engine and model."""
    template: str = "rating"
    """Judge template: a rating gives the expected value over its scale; a pairwise one is asked in
    both orders against each prompt's gold answer and gives P(completion preferred)."""
    rubric: str | None = None
    """Rubric's name or file; None: the template's."""
    cache: Path | None = None
    """File of the judge's reply cache; None: no cache."""
    report_card: Path | None = None
    """The judge's report.json (rlaif report), made with this template: a judge that fails it is
    refused."""
    function: str = ""
    """``package.module:function``, called with lists of prompts and of completions; it returns one
    number for each, or None where it has no score."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming the way out."""
        if self.kind == "model" and not self.models:
            raise RecipeError("kind is 'model' but models is empty: name a reward model's folder")
        if self.kind == "function" and ":" not in self.function:
            raise RecipeError(
                f"function is {self.function!r}; it must be of the form package.module:function"
            )
        if self.models and self.kind != "model":
            raise RecipeError(f"models does nothing with kind {self.kind!r}; remove it")
        if self.report_card is not None and self.kind != "judge":
            raise RecipeError(f"report_card does nothing with kind {self.kind!r}; remove it")
        if self.function and self.kind != "function":
            raise RecipeError(f"function does nothing with kind {self.kind!r}; remove it")
        if self.ensemble != "mean" and len(self.models) < 2:
            raise RecipeError(f"ensemble {self.ensemble!r} needs at least two reward models")


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """Overoptimisation guard: a gold scorer that took no part in the reward."""

    gold: RewardSource = field(default_factory=RewardSource)
    """The gold scorer; kind none: no guard."""
    every: int = 10
    """Steps between probes; the start and the last step are always probed. The run's result is the
    best policy among those that were probed."""
    prompts: tuple[str, ...] = ()
    """Prompt files or folders for the probes; none: prompts held out of training."""
    prompt_count: int = 64
    """Prompts per probe."""
    completions: int = 1
    """Completions per prompt and probe."""
    patience: int = 2
    """Probes in a row that lie below the best one before the run stops."""
    tolerance: float = 1.0
    """A probe lies below the best when its mean gold score does so by more than this many standard
    errors of the prompts' differences."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.every < 1 or self.prompt_count < 2 or self.completions < 1 or self.patience < 1:
            raise RecipeError(
                "the guard needs every, completions and patience >= 1 and prompt_count >= 2"
            )


@dataclass(frozen=True, kw_only=True)
class PpoOptions:
    """Proximal policy optimisation against a reward model, a judge, or a function."""

    prompts: tuple[str, ...]
    """Prompts to learn on: folders or JSONL files of prompts, candidates, preferences or
    rankings, or names of prompt sets."""
    output: Path
    """Folder for the trained policy, its card, metrics and checkpoints."""
    reward: RewardSource = field(default_factory=RewardSource)
    """What is maximised; its kind must be given."""
    guard: GuardOptions = field(default_factory=GuardOptions)
    """The overoptimisation guard."""
    accept_bias: tuple[str, ...] = ()
    """Figures of reward.report_card whose failure you accept by name."""

    model: str = "pocket:policy"
    """Policy to start from: a folder, a Hub name, or an embedded model."""
    revision: str | None = None
    """Model revision (commit or tag) on the Hub."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer; None: the model's own."""
    chat_template: Path | None = None
    """File with a Jinja chat template; None: the tokenizer's own."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust its author."""
    reference_model: str | None = None
    """Model that the KL penalty holds the policy to; None: the starting policy (with lora_rank the
    same weights with adapters off, else a frozen copy)."""
    value: Literal["separate", "shared"] = "separate"
    """separate: a value model of its own; shared: a value head on the policy's hidden states."""
    value_model: str | None = None
    """What the separate value model starts from; None: the first reward model where its tokenizer
    is the policy's, else the policy. A language model gets a new head, of zeros."""

    steps: int = 100
    """Rollout-and-update steps."""
    prompts_per_step: int = 32
    """Prompts per step, over all processes."""
    completions_per_prompt: int = 4
    """Completions sampled for each prompt; the prompt is computed once for all of them."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out (counted)."""
    max_tokens: int = 128
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the same value divides the logits in every log-probability."""
    top_p: float = 1.0
    """Nucleus of the sampler; below 1 the samples are not quite the policy's own, and vllm's
    log-probabilities are of the nucleus."""
    sampler: Literal["auto", "cached", "generate", "vllm"] = "auto"
    """cached: batched decoding with the policy itself; generate: the model's own generate, for
    unusual caches; vllm: an engine beside the policy on the same GPU, whose samples there do not
    follow the seed: neither a resumed run nor the guard's probes draw the same again. auto: vllm on
    CUDA where it is installed, else cached."""
    sampler_tokens: int = 0
    """Tokens that the cached sampler holds keys and values of at one time; 0: 262,144 on CUDA,
    65,536 on CPU."""
    vllm_memory: float = 0.3
    """Share of GPU memory that vLLM may take while it is awake."""
    vllm_sleep: bool = True
    """vLLM frees its memory between rollouts (CUDA)."""
    vllm_eager: bool = False
    """vLLM without compilation and graphs: starts a minute sooner, samples slower."""
    importance_cap: float = 2.0
    """Cap of the weights that correct for the sampler's log-probabilities; 0: no correction."""
    sampler_tolerance: float = 0.2
    """Stop when sampler and trainer disagree on the samples' log-probabilities by more than this
    many nats per token on average: the sampler has other weights."""

    learning_rate: float = 3e-6
    """Peak learning rate of the policy."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value model; None: the policy's."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up: falls to 0 in a line, in a half cosine, or stays."""
    warmup: float = 0.0
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay of matrices; norms and biases have none."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: float = 1e-5
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, policy and value apart; 0: never."""
    ppo_epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimiser steps per pass."""
    cliprange: float = 0.2
    """Clip of the policy's ratio."""
    cliprange_high: float | None = None
    """Upper clip of the ratio; None: cliprange."""
    dual_clip: float = 0.0
    """Bound of the loss at negative advantages, in advantages, above 1; 0: none."""
    cliprange_value: float = 0.2
    """Clip of the value's change; 0: none."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    value_lam: float | None = None
    """Lambda of the value target; None: lam."""
    critic_warmup: int = 0
    """First steps in which only the value model learns."""
    stop_kl: float = 0.0
    """Passes over a rollout end early once the approximate KL to the rollout's policy exceeds
    this; 0: never."""

    kl_coef: float = 0.05
    """Weight of the KL penalty in the reward."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Per-token estimate of the KL to the reference: k1 the log-ratio, k3 its non-negative form."""
    kl_target: float | None = None
    """Steer kl_coef towards this KL per completion, in nats; None: fixed."""
    kl_horizon: int = 10_000
    """Completions over which the steering acts."""
    max_kl: float = 0.0
    """Stop the run once the KL to the reference exceeds this many nats per completion; 0: never."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1, mean kept."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1."""
    normalise_rewards: Literal["none", "fixed", "running"] = "none"
    """Scores to mean 0 and deviation 1: by the moments of the first rollout whose scores differ and
    those before it (the starting policy's), or of all rollouts so far."""
    reward_clip: float = 0.0
    """Normalised scores are clipped to this magnitude; 0: not."""
    missing_eos_penalty: float | None = 1.0
    """Taken off the score of a completion that was cut off; None: nothing."""
    missing_eos_score: float | None = None
    """Score of a completion that was cut off, whatever the reward says; None: the reward's."""

    row_tokens: int = 0
    """Tokens per packed row, which is one forward pass; 0: 32,768 on CUDA, 2,048 on CPU."""
    attention: Literal["auto", "triton", "flex", "varlen", "sdpa", "blocks"] = "auto"
    """Attention kernel for packed rows."""
    precision: Literal["auto", "float32", "bfloat16", "autocast"] = "auto"
    """bfloat16: weights in bfloat16 with float32 master copies in the optimiser; autocast: float32
    weights, bfloat16 products; auto: bfloat16 on CUDA, float32 on CPU."""
    compile: Literal["auto", "none", "layers"] = "auto"
    """torch.compile of each decoder layer; auto: on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, of the policy and the value model."""
    logprob_chunk: int = 0
    """Completion tokens whose logits exist at one time; 0: chosen from the vocabulary's size."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda."""

    lora_rank: int = 0
    """Rank of LoRA adapters on the policy; 0: train all weights."""
    lora_alpha: float = 0.0
    """LoRA's alpha; 0: twice the rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules that get adapters: all-linear, or names such as q_proj."""

    seed: int = 0
    """Seed of prompts' order, samples and initial weights."""
    save_every: int = 0
    """Steps between checkpoints; 0: only when stopped."""
    keep_checkpoints: int = 1
    """How many checkpoints to keep."""
    copy_every: int = 0
    """Steps between copies of the policy kept in the folder policies; 0: none."""
    log_every: int = 1
    """Steps between log lines on the terminal; metrics.jsonl has every step."""
    report_to: tuple[str, ...] = ()
    """Trackers of accelerate: tensorboard, wandb, mlflow ..."""
    resume: bool = True
    """Continue from the last checkpoint in the output folder, if there is one of the same run."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work, naming the way out."""
        if self.prompts_per_step < self.minibatches or self.minibatches < 1:
            raise RecipeError(
                f"minibatches is {self.minibatches}; it must lie between 1 and prompts_per_step "
                f"({self.prompts_per_step})"
            )
        if self.temperature <= 0:
            raise RecipeError("temperature must be above 0: PPO learns from random samples")
        if self.dual_clip and self.dual_clip <= 1:
            raise RecipeError(f"dual_clip is {self.dual_clip}; it must be above 1, or 0 for none")
        if self.value == "shared" and self.value_model:
            raise RecipeError("value 'shared' has no model of its own: remove value_model")
        if self.missing_eos_score is not None and self.missing_eos_penalty not in (None, 1.0):
            raise RecipeError("missing_eos_score and missing_eos_penalty are both set; keep one")
        if self.reward_clip and self.normalise_rewards == "none":
            raise RecipeError("reward_clip acts on normalised scores: set normalise_rewards too")
        if self.lora_rank and self.reference_model:
            raise RecipeError(
                "with lora_rank the reference is the policy with adapters off: remove "
                "reference_model"
            )
        if self.steps < 1 or self.ppo_epochs < 1 or self.completions_per_prompt < 1:
            raise RecipeError("steps, ppo_epochs and completions_per_prompt must be at least 1")

    def engine_options(self, *, model: str | None = None, lora: bool = True) -> TrainOptions:
        """Return the options with which the packed engine loads a model of this run."""
        return TrainOptions(
            data=self.prompts,
            output=self.output,
            model=model or self.model,
            revision=self.revision if model is None else None,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
            max_length=self.max_prompt_tokens + self.max_tokens,
            attention=self.attention,
            precision=self.precision,
            compile=self.compile,
            gradient_checkpointing=self.gradient_checkpointing,
            device=self.device,
            lora_rank=self.lora_rank if lora else 0,
            lora_alpha=self.lora_alpha if lora else 0.0,
            lora_targets=self.lora_targets if lora else ("all-linear",),
            seed=self.seed,
        )
