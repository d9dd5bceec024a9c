"""Select the largest of sharded scores exactly, by counting, without gathering them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .topk import NAN_SCORES

_INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
_DIGIT_BITS = 11


@dataclass(frozen=True)
class Shards:
    """The processes that hold the parts of sharded tensors.

    Args:
        rank: rank of this process, from 0. In row-major order the part of rank 0 comes first, then that of rank 1
            and so on.
        size: number of processes.
        sum: function that sums an int64 tensor over the processes (an all-reduce).
    """

    rank: int
    size: int
    sum: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RankedGroup:
    """Tensors that are ranked together.

    Args:
        names: names of the tensors, in the order that breaks ties.
        kept: number of scores kept over all processes.
    """

    names: Sequence[str]
    kept: int


@torch.no_grad()
def select_on_shards(parts: Mapping[str, Tensor], groups: Sequence[RankedGroup], shards: Shards) -> dict[str, Tensor]:
    """Select exactly the largest scores of each group; all processes call this together.

    A radix search: floats are mapped to integers of the same order, and the threshold is found digit by digit, from
    histograms that are summed over the processes (three for float32, however many scores there are). Ties are broken
    by the order of the names, then by row-major index, as [`~masking.select_masks`] does.

    Args:
        parts: this process's part of each tensor of scores, of any shape, possibly empty; names and dtypes are the
            same on every process.
        groups: names that are ranked together; each name is in one group.
        shards: the processes that hold the parts.

    Returns:
        A contiguous bool tensor for each part, True where the score is kept.

    Raises:
        ValueError: there are NaN among the scores of some process; raised on all of them.
    """
    refuse_nan(parts.values(), shards)
    keys = _ordered_integers(parts)
    thresholds, kept_ties = _thresholds(keys, groups, shards)
    masks, ties = {}, {}
    for group, threshold in zip(groups, thresholds, strict=True):
        for name in group.names:
            masks[name] = keys[name] > threshold
            ties[name] = (keys[name] == threshold).flatten().nonzero().squeeze(1)
    before = _counted_before({name: len(index) for name, index in ties.items()}, groups, shards, keys)
    for group, kept in zip(groups, kept_ties, strict=True):
        for name in group.names:
            masks[name].view(-1)[ties[name][: max(kept - before[name], 0)]] = True
    return {name: masks[name] for name in parts}


def refuse_nan(parts: Iterable[Tensor], shards: Shards) -> None:
    """Raise a ValueError on every process if any of them holds a NaN."""
    if shards.sum(torch.stack([part.isnan().sum() for part in parts]).sum()) > 0:
        raise ValueError(NAN_SCORES)


def _ordered_integers(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map floats to contiguous integers of the widest dtype in the same order; equal floats give equal integers."""
    widest = functools.reduce(torch.promote_types, [part.dtype for part in parts.values()])
    keys = {}
    for name, part in parts.items():
        # Adding zero makes -0.0 the 0.0 that it equals.
        integers = (part.detach().to(widest).contiguous() + 0.0).view(_INTEGERS[torch.finfo(widest).bits])
        # Negative floats are ordered by magnitude; flipping all bits but the sign turns that around.
        keys[name] = torch.where(integers < 0, integers ^ torch.iinfo(integers.dtype).max, integers)
    return keys


def _thresholds(
    keys: Mapping[str, Tensor], groups: Sequence[RankedGroup], shards: Shards
) -> tuple[list[int], list[int]]:
    """Find the smallest key kept in each group, and the number of keys kept that equal it."""
    example = next(iter(keys.values()))
    bits, lowest = torch.iinfo(example.dtype).bits, torch.iinfo(example.dtype).min
    # With the sign bit flipped, the digits read as unsigned have the order of the keys.
    candidates = [torch.cat([keys[name].flatten() for name in group.names]) ^ lowest for group in groups]
    wanted = torch.tensor([group.kept for group in groups], device=example.device)
    found = torch.zeros_like(wanted)
    for top in range(bits, 0, -_DIGIT_BITS):
        shift = max(top - _DIGIT_BITS, 0)
        size = 1 << (top - shift)
        digits = [(group >> shift) & (size - 1) for group in candidates]
        histograms = shards.sum(torch.stack([torch.bincount(group, minlength=size) for group in digits]))
        at_least = histograms.flip(1).cumsum(1).flip(1)
        # The largest digit that as many candidates reach as are wanted; where none is wanted, the largest there is.
        chosen = ((at_least >= wanted.clamp_min(1)[:, None]).sum(1) - 1).clamp_min(0)
        wanted -= (at_least - histograms).gather(1, chosen[:, None]).squeeze(1)
        found = (found << (top - shift)) | chosen
        candidates = [
            group[digit == choice] for group, digit, choice in zip(candidates, digits, chosen.tolist(), strict=True)
        ]
    return (found + lowest).tolist(), wanted.tolist()


def _counted_before(
    counts: Mapping[str, int], groups: Sequence[RankedGroup], shards: Shards, like: Mapping[str, Tensor]
) -> dict[str, int]:
    """Count the ties that precede the part of this process in each tensor of a group."""
    device = next(iter(like.values())).device
    table = torch.zeros(len(counts), shards.size, dtype=torch.int64, device=device)
    table[:, shards.rank] = torch.tensor(list(counts.values()), device=device)
    rows, before = iter(shards.sum(table).tolist()), {}
    for group in groups:
        passed = 0
        for name in group.names:
            row = next(rows)
            before[name] = passed + sum(row[: shards.rank])
            passed += sum(row)
    return before
