"""Forward passes that compute shared prefixes once.

All questions about one prompt begin with the same tokens: template head, criteria, conversation;
those that show the same completion first share that too. ``plan_stems`` finds such runs, on two
levels where the second pays; ``plan_batches`` packs them under a token budget; ``last_logits`` runs
each level over a copy of the keys and values of the level before. The result equals a plain forward
pass, which a plan without prefixes is.

On every level rows are aligned to the right: a row with fewer new tokens than others computes the
last tokens of its prefix again where others compute new ones, so no gap stands between prefix and
remainder, and sliding windows see true distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = [
    "Group",
    "Stem",
    "common_prefix",
    "last_logits",
    "members_of",
    "plan_batches",
    "plan_groups",
    "plan_stems",
]

# A second level is computed where it saves at least this share of the tokens.
_SECOND_LEVEL_SHARE = 0.1
_SECOND_LEVEL_MEMBERS = 4


class Group(NamedTuple):
    """Rows (by number) whose first ``prefix`` tokens are the same."""

    prefix: int
    members: list[int]


class Stem(NamedTuple):
    """Groups whose own prefixes have their first ``prefix`` tokens in common; 0: a single group."""

    prefix: int
    groups: list[Group]


class _State(NamedTuple):
    """Keys and values after a level: right-aligned rows of ``totals`` tokens."""

    cache: Any
    totals: Any
    """(R,) tokens of each row."""
    width: int
    """Columns of the cache."""


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


def plan_stems(rows: Sequence[list[int]]) -> list[Stem]:
    """Return the groups of ``rows`` on two levels where that pays, else on one.

    A group whose members share more among themselves is split; groups that stand side by side and
    share a prefix are joined.
    """
    stems: list[Stem] = []
    loose: list[Group] = []
    for group in plan_groups(rows):
        inner = _inner_groups(rows, group)
        if inner is None:
            loose.append(group)
        else:
            stems.append(Stem(group.prefix, inner))
    return stems + _joined(rows, loose)


def _inner_groups(rows: Sequence[list[int]], group: Group) -> list[Group] | None:
    """Return a second level inside a group, or None where it does not pay."""
    if not group.prefix or len(group.members) < _SECOND_LEVEL_MEMBERS:
        return None
    rest = [rows[member][group.prefix :] for member in group.members]
    inner = plan_groups(rest)
    saved = sum(part.prefix * (len(part.members) - 1) for part in inner)
    if saved < _SECOND_LEVEL_SHARE * sum(map(len, rest)):
        return None
    return [
        Group(group.prefix + part.prefix, [group.members[at] for at in part.members])
        for part in inner
    ]


def _joined(rows: Sequence[list[int]], groups: Sequence[Group]) -> list[Stem]:
    """Join neighbours that share a prefix, as long as that saves more and more tokens."""
    stems: list[Stem] = []
    for group in groups:
        if stems and group.prefix:
            prefix, before = stems[-1]
            head = rows[before[0].members[0]]
            limit = min(before[0].prefix, group.prefix) if len(before) == 1 else prefix
            shared = min(limit, common_prefix(head, rows[group.members[0]]), group.prefix)
            if shared * len(before) > prefix * (len(before) - 1):
                stems[-1] = Stem(shared, [*before, group])
                continue
        stems.append(Stem(group.prefix, [group]))
    result = []
    for stem in stems:
        cost = sum(
            part.prefix + sum(len(rows[member]) - part.prefix for member in part.members)
            for part in stem.groups
        )
        if stem.prefix * (len(stem.groups) - 1) >= _SECOND_LEVEL_SHARE * cost:
            result.append(stem)
        else:
            result += [Stem(0, [part]) for part in stem.groups]
    return result


def members_of(batch: Sequence[Stem]) -> list[int]:
    """Return the rows of a batch, in the order in which ``last_logits`` returns them."""
    return [member for stem in batch for group in stem.groups for member in group.members]


def plan_batches(
    rows: Sequence[list[int]], stems: Sequence[Stem], budget: int
) -> Iterator[list[Stem]]:
    """Yield batches of stems; rows times longest remainder stays within ``budget`` tokens.

    Stems of one kind, with remainders of like length, stand together. One over the budget is split.
    """
    pieces = [piece for stem in stems for piece in _split(rows, stem, budget)]
    pieces.sort(key=lambda piece: (piece.prefix > 0, _width(rows, piece), piece.prefix))
    batch: list[Stem] = []
    count = width = 0
    for piece in pieces:
        own, longest = len(members_of([piece])), _width(rows, piece)
        full = (count + own) * max(width, longest) > budget
        if batch and (full or (piece.prefix > 0) != (batch[0].prefix > 0)):
            yield batch
            batch, count, width = [], 0, 0
        batch.append(piece)
        count, width = count + own, max(width, longest)
    if batch:
        yield batch


def _width(rows: Sequence[list[int]], stem: Stem) -> int:
    return max(
        len(rows[member]) - group.prefix for group in stem.groups for member in group.members
    )


def _split(rows: Sequence[list[int]], stem: Stem, budget: int) -> Iterator[Stem]:
    most = max(1, budget // _width(rows, stem))
    groups: list[Group] = []
    count = 0
    for group in stem.groups:
        for start in range(0, len(group.members), most):
            members = group.members[start : start + most]
            if groups and count + len(members) > most:
                yield Stem(stem.prefix, groups)
                groups, count = [], 0
            groups.append(Group(group.prefix, members))
            count += len(members)
    yield Stem(stem.prefix, groups)


def last_logits(model: Any, rows: Sequence[list[int]], batch: Sequence[Stem]) -> Any:
    """Return the logits after each row's last token, float32, in the order of ``members_of``.

    Args:
        model: causal language model of ``transformers``, in inference mode.
        rows: token ids.
        batch: stems to run together; all of them with a second level, or none.

    Returns:
        Tensor (number of members, vocabulary).
    """
    groups = [group for stem in batch for group in stem.groups]
    state: _State | None = None
    if any(stem.prefix for stem in batch):
        heads = [rows[stem.groups[0].members[0]][: stem.prefix] for stem in batch]
        state, _ = _level(model, heads, None, [], keep=True)
    owners = [place for place, stem in enumerate(batch) for _ in stem.groups]
    if any(group.prefix for group in groups):
        heads = [rows[group.members[0]][: group.prefix] for group in groups]
        state, _ = _level(model, heads, state, owners, keep=True)
        owners = [place for place, group in enumerate(groups) for _ in group.members]
    members = [rows[member] for group in groups for member in group.members]
    return _level(model, members, state, owners)[1]


def _level(
    model: Any,
    rows: Sequence[list[int]],
    before: _State | None,
    owners: Sequence[int],
    *,
    keep: bool = False,
) -> tuple[_State, Any]:
    """Run the tokens of ``rows`` that the rows before, of which they are continuations, lack.

    Args:
        model: as in ``last_logits``.
        rows: token ids from the very first one on.
        before: the level before, or None.
        owners: which row of the level before each row continues.
        keep: whether another level follows, which needs keys and values.

    Returns:
        The state after the level, and the logits after each row's last token.
    """
    import torch

    totals = torch.tensor([len(row) for row in rows])
    known = torch.zeros_like(totals) if before is None else before.totals[list(owners)]
    width = max(int((totals - known).max()), 1)
    kept = (totals - width).clamp(min=0)
    longest = 0 if before is None else int(kept.max())
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        tail = row[-width:]
        if tail:
            ids[place, width - len(tail) :] = torch.tensor(tail)
    positions = (totals[:, None] - width + torch.arange(width)).clamp(min=0)
    mask = torch.arange(longest + width) >= (longest + width - totals)[:, None]
    cache = _continued(before, owners, kept, longest) if before or keep else None
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.long().to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    ).logits
    return _State(cache, totals, longest + width), logits[:, -1].float()


def _continued(before: _State | None, owners: Sequence[int], kept: Any, longest: int) -> Any:
    """Return a cache that holds each row's first ``kept`` tokens, right-aligned."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    if before is None or not longest:
        return cache
    owner = torch.tensor(list(owners))
    starts = before.width - before.totals[owner]
    source = torch.arange(longest) - (longest - kept)[:, None] + starts[:, None]
    device = before.cache.layers[0].keys.device
    owner, source = owner[:, None].to(device), source.clamp(min=0).to(device)
    for number, layer in enumerate(before.cache.layers):
        keys = layer.keys[owner, :, source].transpose(1, 2)
        values = layer.values[owner, :, source].transpose(1, 2)
        cache.update(keys, values, number)
    return cache
