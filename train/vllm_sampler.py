"""Sampling by vLLM beside the trainer, in the same process and on the same GPU.

Before each rollout the engine wakes, takes over the policy's weights, and forgets what it cached of
the old ones; after it, it sleeps and its memory is the trainer's again (sleep level 2: weights and
keys are dropped, not kept elsewhere). The log-probabilities it reports come from other kernels than
the trainer's; they are kept, compared with the trainer's own, and corrected for. With top_p below 1
they are of the nucleus that was drawn from, not of the whole vocabulary.

On a GPU the seeds of the prompts are not used: a run that is repeated or resumed draws other
samples, and so do the guard's probes, whose comparison then holds the noise of both draws.

Only in this process: one policy, one GPU (or, for tests, a CPU).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from feedback.backends.head import vllm_overrides
from feedback.backends.vllm_faults import engine_errors
from feedback.errors import BackendError
from train.models import base_model
from train.sampler import Sample, SamplingPlan, TokenIds

__all__ = ["VllmSampler", "full_weights"]


class VllmSampler:
    """vLLM with the policy's weights.

    Args:
        policy: the model being trained; it must come from a folder or the Hub, which vLLM loads.
        max_length: longest prompt plus completion, in tokens.
        memory: share of GPU memory to take while awake.
        sleep: give the memory back between rollouts (CUDA only).
        eager: no compilation and no graphs: starts faster, runs slower.
        seed: of the engine's sampling; on a CPU each prompt has its own besides.
        settings: further arguments of ``vllm.LLM``.

    Raises:
        BackendError: vLLM cannot load the model.
    """

    def __init__(
        self,
        policy: Any,
        *,
        max_length: int,
        memory: float = 0.3,
        sleep: bool = True,
        eager: bool = False,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ):
        # The engine must live in this process: weights are handed over, not sent.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        weights = next(base_model(policy).parameters())
        folder = base_model(policy).config.name_or_path
        # Log-probabilities from rounded logits would stray from the trainer's, which are not.
        more = dict(settings or {})
        more |= vllm_overrides(folder, more, revision=None, trust_remote_code=False)
        self.cuda = weights.is_cuda
        self.sleeps = sleep and self.cuda
        self.awake = True
        try:
            self.engine: Any = LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype=str(weights.dtype).removeprefix("torch."),
                max_model_len=max_length,
                gpu_memory_utilization=memory,
                enable_sleep_mode=self.sleeps,
                enforce_eager=eager or not self.cuda,
                enable_prefix_caching=True,
                # Log-probabilities at the sampling temperature, as the trainer computes them.
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                seed=seed,
                **more,
            )
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise BackendError(
                f"vLLM cannot load the policy: {error}; use --sampler cached, or give vLLM more "
                "room (--vllm-memory)"
            ) from error
        self._doze()

    def sync(self, policy: Any) -> None:
        """Wake up and take over the policy's weights."""
        if self.sleeps and not self.awake:
            torch.cuda.empty_cache()
            self.engine.wake_up(tags=["weights"])
        if self.cuda:
            self.engine.apply_model(_Loader(policy))
        else:
            # CPU kernels keep a repacked copy of the weights, which only a reload renews.
            self.engine.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": full_weights(policy)}
            )
            if base_model(policy).config.tie_word_embeddings:
                self.engine.apply_model(_repack_tied_head)
        if self.sleeps and not self.awake:
            self.engine.wake_up(tags=["kv_cache"])
        self.awake = True
        # Keys and values of the old weights must not be found again.
        self.engine.reset_prefix_cache()

    def sample(
        self, prompts: Sequence[TokenIds], *, seeds: Sequence[int], n: int, plan: SamplingPlan
    ) -> list[list[Sample]]:
        """Return ``n`` completions of each prompt, in order.

        Raises:
            BackendError: ``sync`` was not called since the engine went to sleep, or vLLM failed.
        """
        if not self.awake:
            raise BackendError("vLLM is asleep and has no weights: call sync before sample")
        errors = engine_errors()
        try:
            outputs = self.engine.generate(
                [{"prompt_token_ids": list(map(int, ids))} for ids in prompts],
                [self._parameters(seed, n, plan) for seed in seeds],
                use_tqdm=False,
            )
        except (*errors.refused, *errors.died) as error:
            raise BackendError(
                f"vLLM failed to sample: {error}; lower --vllm-memory if it ran out of memory, and "
                "run the command again to continue from the last checkpoint"
            ) from error
        found = [
            [_sample(output) for output in sorted(request.outputs, key=lambda one: one.index)]
            for request in outputs
        ]
        self._doze()
        return found

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        import gc

        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        gc.collect()

    def _doze(self) -> None:
        if self.sleeps:
            self.engine.sleep(level=2)
            self.awake = False

    def _parameters(self, seed: int, n: int, plan: SamplingPlan) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=n,
            max_tokens=plan.max_tokens,
            temperature=plan.temperature,
            top_p=plan.top_p,
            top_k=plan.top_k or -1,
            # A seed of its own costs each request a kernel launch per token: on a GPU, where no two
            # runs are equal anyway, the engine's seed is enough.
            seed=None if self.cuda else seed,
            stop_token_ids=sorted(plan.stop_ids),
            ignore_eos=True,
            logit_bias=dict.fromkeys(plan.banned_ids, -100.0) or None,
            logprobs=0,
            detokenize=False,
        )


class _Loader:
    """Loads the policy's weights into the engine's model, where it stands."""

    def __init__(self, policy: Any):
        self.policy = policy

    def __call__(self, model: Any) -> None:
        model.load_weights(full_weights(self.policy))


def _repack_tied_head(model: Any) -> None:
    """Renew the CPU copy of an output embedding that is the input embedding; a reload skips it."""
    head = model.lm_head
    head.weight = model.model.embed_tokens.weight
    head.quant_method.process_weights_after_loading(head)


def _sample(output: Any) -> Sample:
    ids = list(output.token_ids)
    logprobs = [place[token].logprob for token, place in zip(ids, output.logprobs, strict=True)]
    return Sample(ids, logprobs, output.finish_reason == "stop")


def full_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the policy's weights by the names of its plain form, adapters added in.

    The adapters' part is added on the way, tensor by tensor: merging and unmerging in place would
    round the frozen weights a little at every step.
    """
    model = base_model(policy)
    deltas = {
        name: module
        for name, module in model.named_modules()
        if hasattr(type(module), "get_delta_weight")
    }
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            weight = parameter.detach()
            if leaf == "weight":
                for adapter in deltas[owner].active_adapters:
                    weight = weight + deltas[owner].get_delta_weight(adapter).to(weight.dtype)
            yield f"{owner}.{leaf}", weight
        else:
            yield name, parameter.detach()
