"""Forward passes that compute a shared prefix once.

All questions about one prompt begin with the same tokens: template head, criteria, conversation.
``plan_groups`` finds such runs, ``plan_batches`` packs them under a token budget, and
``last_logits`` runs the prefixes once, then each row's remainder over a copy of its prefix's keys
and values. The result equals a plain forward pass; a plan of groups without prefix is one.

In a batch every row is aligned to the right: a row with a shorter remainder computes the last
tokens of its prefix again where others compute remainder, so no gap stands between prefix and
remainder, and sliding windows see true distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["Group", "common_prefix", "last_logits", "plan_batches", "plan_groups"]


class Group(NamedTuple):
    """Rows (by number) whose first ``prefix`` tokens are the same."""

    prefix: int
    members: list[int]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens two rows share."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def plan_groups(rows: Sequence[list[int]]) -> list[Group]:
    """Return groups of rows such that computing each prefix once saves the most tokens.

    A row joins its neighbour's group (in sorted order) where the prefix it saves is longer than
    what the group's other members lose by sharing less. One token of each row stays outside.
    """
    order = sorted(range(len(rows)), key=lambda place: rows[place])
    groups: list[Group] = []
    for place in order:
        row = rows[place]
        if groups:
            prefix, members = groups[-1]
            shared = min(prefix, common_prefix(rows[members[0]], row), len(row) - 1)
            if (prefix - shared) * (len(members) - 1) < shared:
                members.append(place)
                groups[-1] = Group(shared, members)
                continue
        groups.append(Group(len(row) - 1, [place]))
    return [Group(prefix if len(members) > 1 else 0, members) for prefix, members in groups]


def plan_batches(
    rows: Sequence[list[int]], groups: Sequence[Group], budget: int
) -> Iterator[list[Group]]:
    """Yield batches of groups; rows times longest remainder stays within ``budget`` tokens.

    Groups with remainders of like length stand together. A group over the budget is split.
    """
    pieces = [piece for group in groups for piece in _split(rows, group, budget)]
    pieces.sort(key=lambda piece: (_width(rows, piece), piece.prefix))
    batch: list[Group] = []
    count = 0
    for piece in pieces:
        # Sorted: the newest piece has the longest remainder.
        if batch and (count + len(piece.members)) * _width(rows, piece) > budget:
            yield batch
            batch, count = [], 0
        batch.append(piece)
        count += len(piece.members)
    if batch:
        yield batch


def _width(rows: Sequence[list[int]], group: Group) -> int:
    return max(len(rows[member]) for member in group.members) - group.prefix


def _split(rows: Sequence[list[int]], group: Group, budget: int) -> Iterator[Group]:
    most = max(1, budget // _width(rows, group))
    for start in range(0, len(group.members), most):
        members = group.members[start : start + most]
        yield Group(group.prefix if len(members) > 1 else 0, members)


def last_logits(model: Any, rows: Sequence[list[int]], batch: Sequence[Group]) -> Any:
    """Return the logits after each row's last token, float32, in the order of the members.

    Args:
        model: causal language model of ``transformers``, in inference mode.
        rows: token ids.
        batch: groups of rows to run together.

    Returns:
        Tensor (number of members, vocabulary).
    """
    import torch

    members = [member for group in batch for member in group.members]
    device = model.device
    totals = torch.tensor([len(rows[member]) for member in members])
    width = max(len(rows[member]) - group.prefix for group in batch for member in group.members)
    kept = (totals - width).clamp(min=0)
    longest = int(kept.max())
    ids = torch.zeros(len(members), width, dtype=torch.long)
    for place, member in enumerate(members):
        tail = rows[member][-width:]
        ids[place, width - len(tail) :] = torch.tensor(tail)
    positions = (totals[:, None] - width + torch.arange(width)).clamp(min=0)
    mask = torch.arange(longest + width) >= (longest + width - totals)[:, None]
    cache = _row_cache(model, rows, batch, kept, longest) if longest else None
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.long().to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    ).logits
    return logits[:, -1].float()


def _row_cache(
    model: Any, rows: Sequence[list[int]], batch: Sequence[Group], kept: Any, longest: int
) -> Any:
    """Run the prefixes; return a cache with each row's first ``kept`` tokens, right-aligned."""
    import torch
    from transformers import DynamicCache

    device = model.device
    width = max(group.prefix for group in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    for place, group in enumerate(batch):
        ids[place, : group.prefix] = torch.tensor(rows[group.members[0]][: group.prefix])
    # Padding on the right needs no mask: what stands before it cannot see it.
    prefixes = DynamicCache()
    model(input_ids=ids.to(device), past_key_values=prefixes, use_cache=True, logits_to_keep=1)
    owner = torch.tensor([place for place, group in enumerate(batch) for _ in group.members])
    source = (torch.arange(longest) - (longest - kept)[:, None]).clamp(min=0)
    owner, source = owner[:, None].to(device), source.to(device)
    cache = DynamicCache()
    for number, layer in enumerate(prefixes.layers):
        keys = layer.keys[owner, :, source].transpose(1, 2)
        values = layer.values[owner, :, source].transpose(1, 2)
        cache.update(keys, values, number)
    return cache
