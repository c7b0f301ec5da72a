"""One rollout: prompts, sampled completions, their scores, and what the networks say of them.

A rollout is made in two moves. ``collect`` samples and scores; text is the boundary between policy
and reward, so their tokenizers may differ. ``recompute`` runs policy, value head and reference over
packed rows, a prompt once for all of its completions. All (N, T) tensors are right-padded on the
CPU, one row per completion in the order of the groups; a completion without a score keeps its row
with a mask of False, so that it counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from feedback import inputs
from feedback.errors import InputError
from feedback.records import (
    Candidates,
    Preference,
    Prompt,
    PromptText,
    Ranking,
    content_id,
)
from feedback.sampling import prompt_source
from feedback.shards import folder_kind, read_rows
from train.attention import AttentionKind, with_layout
from train.chat import ChatFormat
from train.data import Group
from train.packing import PackedBatch, group_tokens, pack_groups, pack_rows
from train.reward_model import Scorer
from train.sampler import Sample, Sampler, SamplingPlan

__all__ = [
    "PromptTokens",
    "Rollout",
    "RowMaker",
    "collect",
    "read_prompts",
    "recompute",
]

_KINDS: dict[str, type[Any]] = {
    "prompts": Prompt,
    "candidates": Candidates,
    "preferences": Preference,
    "rankings": Ranking,
}


class PromptTokens(NamedTuple):
    """A prompt ready to be sampled from."""

    prompt_id: str
    prompt: PromptText
    ids: list[int]
    gold: str | None = None


class Rollout(NamedTuple):
    """Completions of one step and all that PPO knows of them; N completions of at most T tokens."""

    groups: tuple[Group, ...]
    """Prompts with their completions' token ids, as sampled."""
    texts: tuple[str, ...]
    """(N,) completions as the reward read them."""
    scores: Tensor
    """(N,) what the reward said; NaN where it said nothing."""
    ended: Tensor
    """(N,) bool, ended by a stop token."""
    mask: Tensor
    """(N, T) tokens that count."""
    sampler_logprobs: Tensor
    """(N, T) as the sampler drew them."""
    logprobs: Tensor
    """(N, T) of the policy that sampled, as the trainer computes it."""
    ref_logprobs: Tensor
    """(N, T) of the reference."""
    values: Tensor
    """(N, T) value before each token."""

    @property
    def failed(self) -> int:
        """Completions that got no score."""
        return int(self.scores.isnan().sum())


def read_prompts(
    sources: Sequence[str], chat: ChatFormat, *, max_tokens: int
) -> tuple[list[PromptTokens], int]:
    """Return the distinct prompts of files or folders, and how many were too long.

    Args:
        sources: folders or JSONL files of prompts, candidates, preferences or rankings (a file's
            kind is its name's beginning, prompts unless it says otherwise), or names of prompt
            sets.
        chat: of the policy's tokenizer.
        max_tokens: longer prompts are left out.

    Raises:
        InputError: a row is not what it should be, or nothing is left.
    """
    rows: dict[str, Any] = {}
    for source in sources:
        for row in _rows(prompt_source(Path(source))):
            rows.setdefault(content_id(row.prompt), row)
    encoded = chat.prompt_ids([chat.prompt_text(row.prompt) for row in rows.values()])
    prompts = [
        PromptTokens(row.prompt_id, row.prompt, ids.tolist(), _gold(row))
        for row, ids in zip(rows.values(), encoded, strict=True)
        if len(ids) <= max_tokens
    ]
    if not prompts:
        raise InputError(
            f"no prompts of at most {max_tokens} tokens in {', '.join(map(str, sources))}; raise "
            "max_prompt_tokens or name other prompts"
        )
    return prompts, len(rows) - len(prompts)


def _rows(path: Path) -> Iterator[Any]:
    kind = _kind(path)
    # Prompts are read as sample reads them: without an id, the id is a hash of the prompt.
    return inputs.read_prompts(path) if kind == "prompts" else read_rows(path, _KINDS[kind])


def _gold(row: Any) -> str | None:
    return row.gold if isinstance(row, Prompt | Candidates) else None


def _kind(source: Path) -> str:
    if source.is_dir():
        return folder_kind(source)
    return next((kind for kind in _KINDS if source.name.startswith(kind)), "prompts")


def collect(
    prompts: Sequence[PromptTokens],
    *,
    seeds: Sequence[int],
    n: int,
    sampler: Sampler,
    plan: SamplingPlan,
    scorer: Scorer,
    chat: ChatFormat,
    clock: Callable[[str], Any],
) -> Rollout:
    """Sample ``n`` completions of each prompt and score their texts.

    Args:
        prompts: of this process.
        seeds: one per prompt.
        n: completions per prompt.
        sampler: holds the current policy.
        plan: how to sample.
        scorer: the reward.
        chat: of the policy's tokenizer.
        clock: context manager by phase name, for the time split.
    """
    with clock("generate"):
        drawn = sampler.sample([item.ids for item in prompts], seeds=seeds, n=n, plan=plan)
    samples = [sample for group in drawn for sample in group]
    texts = [_text(sample, chat) for sample in samples]
    with clock("score"):
        scores = scorer.score(
            [item.prompt for item in prompts for _ in range(n)],
            texts,
            ended=[sample.ended for sample in samples],
        ).float()
    groups = tuple(
        Group(
            prompt_id=item.prompt_id,
            prompt_ids=item.ids,
            completions=tuple(sample.token_ids for sample in group),
        )
        for item, group in zip(prompts, drawn, strict=True)
    )
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    sampler_logprobs = torch.zeros(mask.shape)
    sampler_logprobs[mask] = torch.tensor([value for s in samples for value in s.logprobs])
    return Rollout(
        groups=groups,
        texts=tuple(texts),
        scores=scores,
        ended=torch.tensor([sample.ended for sample in samples]),
        mask=mask & ~scores.isnan()[:, None],
        sampler_logprobs=sampler_logprobs,
        logprobs=torch.zeros(mask.shape),
        ref_logprobs=torch.zeros(mask.shape),
        values=torch.zeros(mask.shape),
    )


def _text(sample: Sample, chat: ChatFormat) -> str:
    """Return what a completion says, without the tokens that end it."""
    text: str = chat.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaker:
    """Packs chosen groups of a rollout into rows, and knows whose tokens a row holds."""

    row_tokens: int
    attention: AttentionKind
    device: str

    def rows(
        self, groups: Sequence[Group], members: Sequence[int]
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Yield rows on the device, each with the rollout's row of each of its tokens, (T,).

        Args:
            groups: of the rollout.
            members: indices of the groups to pack.
        """
        first = [0]
        for group in groups:
            first.append(first[-1] + len(group.completions))
        multiple = 1
        if self.attention in ("triton", "flex", "varlen"):
            multiple = max(128, self.row_tokens // 8 // 128 * 128)
        for row in pack_rows([group_tokens(groups[index]) for index in members], self.row_tokens):
            inside = [members[place] for place in row]
            batch = pack_groups([groups[index] for index in inside], multiple=multiple)
            rows = torch.cat([torch.arange(first[index], first[index + 1]) for index in inside])
            tokens = rows[batch.owners]
            yield with_layout(batch, self.attention).to(self.device), tokens.to(self.device)


@torch.no_grad()
def recompute(
    rollout: Rollout,
    maker: RowMaker,
    *,
    score: Callable[[PackedBatch], tuple[Tensor, Tensor]],
    reference: Callable[[PackedBatch], Tensor],
) -> Rollout:
    """Return the rollout with the networks' log-probabilities and values, one pass per row.

    Args:
        rollout: from ``collect``.
        maker: packs the rows.
        score: returns a row's log-probabilities and values, (T,) each.
        reference: returns a row's reference log-probabilities, (T,).
    """
    filled = {
        name: torch.zeros(rollout.mask.shape) for name in ("logprobs", "ref_logprobs", "values")
    }
    for batch, tokens in maker.rows(rollout.groups, range(len(rollout.groups))):
        logprobs, values = score(batch)
        found = torch.stack([logprobs, reference(batch), values]).cpu()
        at = tokens.cpu(), batch.places.cpu()
        for name, row in zip(("logprobs", "ref_logprobs", "values"), found, strict=True):
            filled[name][at] = row
    return rollout._replace(**filled)
