"""Options of the training commands: a frozen dataclass each, help text under each field, no torch.

``TrainOptions`` is what all packed trainers share; ``SftOptions``, ``RewardOptions``,
``DpoOptions`` and ``RrhfOptions`` add what their algorithm needs. Values out of range, wrong
combinations and options that would do nothing are errors when the options are built, not a thousand
steps later (``train/option_checks.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from feedback.errors import RecipeError
from train.option_checks import (
    DPO,
    REWARD,
    RRHF,
    SFT,
    SHARED,
    check_limits,
    check_loggers,
    refuse_inert,
)

__all__ = [
    "DpoOptions",
    "ModelShape",
    "RewardOptions",
    "RrhfOptions",
    "SftOptions",
    "TrainOptions",
]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What every packed trainer needs."""

    data: tuple[str, ...]
    """Shard folders or JSONL files to train on."""
    output: Path
    """Folder for the trained model, its card, metrics and checkpoints."""
    model: str = "pocket:policy"
    """Model to start from: a folder, a Hub name, or an embedded model such as pocket:policy. A LoRA
    adapter is merged into its base first."""
    revision: str | None = None
    """Model revision (commit or tag) on the Hub."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer; None: the model's own."""
    chat_template: Path | None = None
    """File with a Jinja chat template; None: the tokenizer's own."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust its author."""

    epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = 0
    """Optimiser steps at most; 0: as many as the epochs need."""
    batch_size: int = 64
    """Prompts (groups of completions, or documents) per optimiser step, over all processes; 0: as
    many as fill one row per process."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up: falls to 0 in a line, in a half cosine, or stays."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay of matrices; norms and biases have none."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    dropout: bool = False
    """Keep the model's own dropout on. Off, log-probabilities of policy and reference are
    comparable."""
    seed: int = 0
    """Seed of data order and initial weights."""

    max_length: int = 2048
    """Tokens of a prompt plus one of its completions, at most; what is left must fit the model's
    context."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to longer ones; both counts are reported. Truncated completions lose their end
    and their end-of-text token; a prompt of more than half of max_length loses its beginning."""
    row_tokens: int = 0
    """Tokens per packed row, which is one forward pass; 0: 32,768 on CUDA, 2,048 on CPU."""
    share_prompt: bool = True
    """Compute a prompt once for all of its completions. Off only to measure what it brings."""
    pack: bool = True
    """Put several groups into one row. Off only to measure or to check equality."""
    attention: Literal["auto", "triton", "flex", "varlen", "sdpa", "blocks"] = "auto"
    """Attention kernel for packed rows: triton (our own), flex and varlen need CUDA; sdpa has a
    dense mask; blocks runs group by group. auto: triton on CUDA, blocks on CPU."""
    precision: Literal["auto", "float32", "bfloat16", "autocast"] = "auto"
    """bfloat16: weights in bfloat16 with float32 master copies in the optimiser; autocast: float32
    weights, bfloat16 products; auto: bfloat16 on CUDA (autocast with several processes), float32 on
    CPU."""
    compile: Literal["auto", "none", "layers"] = "auto"
    """torch.compile of each decoder layer; auto: on CUDA."""
    activation_budget: float = 0.9
    """Share of a compiled layer's activations kept for its backward pass; the cheapest of the rest
    are computed again. 1 keeps all."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    logprob_chunk: int = 0
    """Completion tokens whose logits exist at one time; 0: chosen from the vocabulary's size."""
    workers: int = -1
    """Processes that prepare batches; -1: one on CUDA, none on CPU."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda."""

    lora_rank: int = 0
    """Rank of LoRA adapters; 0: train all weights."""
    lora_alpha: float = 0.0
    """LoRA's alpha; 0: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' inputs."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules that get adapters: all-linear, or names such as q_proj."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Load the frozen weights quantised (QLoRA); needs lora_rank, and bitsandbytes
    (pip install 'rlaif[quantize]')."""

    accept_bias: tuple[str, ...] = ()
    """Figures of the judge's report card whose failure you accept by name; labels whose judge
    failed are refused otherwise."""
    eval_data: tuple[str, ...] = ()
    """Shard folders or files to evaluate on."""
    eval_share: float = 0.0
    """Share of the training data's prompts held out for evaluation when eval_data is not given;
    the split is by prompt, that of texts by row."""
    eval_every: int = 0
    """Steps between evaluations, where there are rows to evaluate on; 0: only at the end."""
    save_every: int = 0
    """Steps between checkpoints to resume from; 0: none."""
    keep_checkpoints: int = 1
    """How many checkpoints to keep, where save_every makes any."""
    log_every: int = 10
    """Steps between log lines."""
    report_to: tuple[str, ...] = ()
    """Loggers of transformers: tensorboard, wandb, mlflow ..."""
    resume: bool = True
    """Continue from the last checkpoint in the output folder, if there is one of the same run."""
    peak_tflops: float = 0.0
    """Matrix-product peak of one device for the MFU figure; 0: known for common GPUs."""

    def __post_init__(self) -> None:
        """Refuse values and combinations that cannot work or do nothing, naming the way out."""
        check_limits(self)
        check_loggers(self.report_to)
        refuse_inert(self, SHARED)
        if self.eval_data and self.eval_share:
            raise RecipeError("eval_data and eval_share are both given; keep one of them")
        if self.quantize != "none" and not self.lora_rank:
            raise RecipeError("quantize trains adapters over frozen weights: set lora_rank too")
        if self.row_tokens and self.row_tokens < self.max_length:
            raise RecipeError(
                f"row_tokens ({self.row_tokens}) is less than max_length ({self.max_length}): the "
                "longest group must fit into a row; raise row_tokens or lower max_length"
            )


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a model trained from scratch (Llama architecture)."""

    layers: int = 6
    """Decoder layers."""
    width: int = 256
    """Hidden size."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int = 4
    """Key and value heads (fewer than heads: grouped-query attention)."""
    mlp: int = 704
    """Width of the MLP's inner layer."""
    max_positions: int = 2048
    """Longest context."""
    tied: bool = True
    """Input and output embeddings share their weights."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class SftOptions(TrainOptions):
    """Supervised fine-tuning on text, messages, or prompt and completion rows."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after warm-up: falls to 0 in a line, in a half cosine, or stays."""
    warmup: float = 0.03
    """Share of all steps over which the learning rate rises from 0."""
    completion_only: bool = True
    """Only completion (or assistant) tokens carry loss; text rows carry it everywhere."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of schedule linear or cosine, as a share of the peak."""
    shape: ModelShape = field(default_factory=ModelShape)
    """Shape of the model when ``model`` is ``scratch``."""
    engine: Literal["packed", "trl"] = "packed"
    """trl runs TRL's own SFTTrainer on the same rows, as a cross-check."""

    def __post_init__(self) -> None:
        """Refuse what would do nothing."""
        super().__post_init__()
        refuse_inert(self, SFT)


@dataclass(frozen=True, kw_only=True)
class RewardOptions(TrainOptions):
    """Reward model from preferences or rankings."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    loss: Literal["bradley-terry", "rao-kupper", "davidson", "plackett-luce"] = "bradley-terry"
    """bradley-terry: every judged pair, with soft labels (a tie is p = 0.5); rao-kupper, davidson:
    a tie is an outcome of its own; plackett-luce: whole rankings with tied groups."""
    soft_labels: bool = True
    """Use the judge's probability; off: the preferred one is simply right."""
    ties: Literal["use", "drop"] = "use"
    """Pairs that the judge called a tie: train on them, or leave them out (counted)."""
    label_smoothing: float = 0.0
    """Chance that a label is flipped, in [0, 0.5): mixed into p."""
    margin_scale: float = 0.0
    """Times the row's margin: what the rewards of a pair must differ by at least (Llama 2)."""
    average: Literal["prompt", "pair"] = "prompt"
    """What counts as one in the mean loss: a prompt with all of its pairs, or each pair."""
    tie_nu: float | None = None
    """Threshold of rao-kupper (> 1; None: 3) or weight of davidson (> 0; None: 1)."""
    listwise_ties: Literal["average", "davidson"] = "average"
    """plackett-luce: a tied group is the mean over its orders, or an event of its own."""
    centring: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps rewards near zero."""
    length_decorrelation: float = 0.0
    """Weight of the squared correlation of reward and length differences within a packed row."""
    members: int = 1
    """Reward models to train, from different seeds of head and data order: an ensemble."""
    rule: Literal["mean", "min", "uwo"] = "mean"
    """How an ensemble scores: mean, worst case, or mean minus uwo_lambda times the variance."""
    uwo_lambda: float = 0.5
    """Weight of the members' variance under rule uwo."""
    engine: Literal["packed", "trl"] = "packed"
    """trl runs TRL's own RewardTrainer on the same rows (hard labels only), as a cross-check."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work or do nothing, naming the way out."""
        super().__post_init__()
        refuse_inert(self, REWARD)
        _check_tie_model(self)

    @property
    def nu(self) -> float:
        """The tie models' parameter, with its default."""
        return (3.0 if self.loss == "rao-kupper" else 1.0) if self.tie_nu is None else self.tie_nu


@dataclass(frozen=True, kw_only=True)
class DpoOptions(TrainOptions):
    """Direct preference optimisation from preferences or rankings."""

    loss: Literal[
        "sigmoid", "gdpo", "robust", "ipo", "rpo", "simpo", "rao-kupper", "davidson", "listwise"
    ] = "sigmoid"
    """sigmoid: DPO, cDPO with soft labels (optimum at logit p); gdpo: geometric averaging; robust:
    rDPO, hard labels of which the share label_smoothing is flipped (a tie gives no gradient); ipo;
    rpo: reward-aware; simpo: no reference; rao-kupper, davidson: ties as an outcome of their own;
    listwise: Plackett-Luce over whole rankings."""
    beta: float = 0.1
    """Strength of the pull to the reference (ipo: the paper's tau; simpo: the reward scale)."""
    soft_labels: bool = True
    """Use the judge's probability; off: the preferred one is simply right. rpo and listwise read
    none."""
    ties: Literal["use", "drop"] = "use"
    """Rows that the judge called a tie: train on them as p = 0.5 (or as the tie outcome of
    rao-kupper and davidson), or leave them out (counted)."""
    label_smoothing: float = 0.0
    """Chance that a label is flipped, in [0, 0.5): mixed into p; robust needs it as its flip rate,
    in (0, 0.4]."""
    nll_weight: float = 0.0
    """Weight of the chosen completion's mean negative log-likelihood, added to the loss."""
    ld_alpha: float = 1.0
    """LD-DPO: weight of tokens beyond the shorter completion's length; 1: plain DPO."""
    simpo_gamma: float = 0.5
    """SimPO's target margin (loss simpo only)."""
    rpo_eta: float = 1.0
    """RPO: implicit-reward units per unit of the rows' margin (score gap)."""
    rpo_form: Literal["target_to_policy", "policy_to_target", "squared"] = "target_to_policy"
    """RPO's distance to the target."""
    tie_nu: float | None = None
    """Threshold of rao-kupper (> 1; None: 3) or weight of davidson (> 0; None: 1)."""
    ipo_averaged: bool = False
    """Divide IPO's log-ratios by the completion's length first, as TRL does."""
    reference_model: str | None = None
    """Model that gives the reference log-probabilities; None: the starting policy."""
    reference_cache: Path | None = None
    """Folder of cached reference log-probabilities; None: ``reference-cache`` beside the output."""
    drift_warning: float = 0.5
    """Warn when the chosen completions' log-probability (listwise: the best ones') falls by more
    than this many nats per token below the reference; 0: never. simpo has no reference, and no such
    watch."""
    engine: Literal["packed", "trl"] = "packed"
    """trl runs TRL's own DPOTrainer on the same rows (hard labels only), as a cross-check."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work or do nothing, naming the way out."""
        super().__post_init__()
        refuse_inert(self, DPO)
        _check_tie_model(self)
        if self.loss == "robust" and not 0 < self.label_smoothing <= 0.4:
            raise RecipeError(
                "loss robust corrects for a known share of flipped labels: set label_smoothing to "
                f"it, in (0, 0.4], not {self.label_smoothing}; at 0 it would be hard DPO (loss "
                "sigmoid with soft_labels off)"
            )

    @property
    def nu(self) -> float:
        """The tie models' parameter, with its default."""
        return (3.0 if self.loss == "rao-kupper" else 1.0) if self.tie_nu is None else self.tie_nu


@dataclass(frozen=True, kw_only=True)
class RrhfOptions(TrainOptions):
    """Rank responses to align human feedback: from rankings or preferences."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after warm-up: falls to 0 in a line, in a half cosine, or stays."""
    warmup: float = 0.03
    """Share of all steps over which the learning rate rises from 0."""
    rank_weight: float = 1.0
    """Weight of the ranking term beside the SFT term on the best completion."""
    length_penalty: float = 1.0
    """Log-probabilities are divided by the length to this power before they are compared."""
    margin: float = 0.0
    """What the better completion's mean log-probability must exceed the worse one's by, in nats."""
    rank_form: Literal["hinge", "logistic"] = "hinge"
    """hinge: the paper's; logistic: its smooth form, which never stops pushing."""
    sft_form: Literal["sum", "token_mean", "row_mean"] = "sum"
    """SFT term on the best completion: sum over tokens (the paper); mean over tokens; row_mean:
    the authors' code, which divides by the padded row's width and takes the first of tied best."""
    confidence_weights: bool = False
    """Weigh each ordered pair by the judge's confidence in it, |2p - 1|, where p is known."""
    ties: Literal["use", "drop"] = "use"
    """A completion tied with another: no term between the two (use); drop leaves out groups in
    which all are tied, which otherwise still give the SFT term."""

    def __post_init__(self) -> None:
        """Refuse what would do nothing."""
        super().__post_init__()
        refuse_inert(self, RRHF)


def _check_tie_model(options: RewardOptions | DpoOptions) -> None:
    """Refuse a tie model without ties, or with a parameter that it has no meaning for."""
    if options.ties == "drop" and options.loss in ("rao-kupper", "davidson"):
        raise RecipeError(f"{options.loss} models ties: ties = 'drop' would leave it none")
    if options.tie_nu is not None and not options.tie_nu > (options.loss == "rao-kupper"):
        raise RecipeError("tie_nu must be greater than 1 (rao-kupper) or 0 (davidson)")
