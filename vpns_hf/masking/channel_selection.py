"""Select the channels to keep for a share of channels, parameters or multiply-accumulates, with no layer emptied."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .channels import CHANNELS, ChannelGroup, Channels
from .topk import NAN_SCORES, kept_count

_BY_LAYER = ("layer", "row")


@torch.no_grad()
def select_channels(scores: Mapping[str, Tensor], sparsity: float, scope: str, pattern: Channels) -> dict[str, Tensor]:
    """Select the channels that stay: the largest scores, and in every group at least one or `multiple`.

    With the unit channels and no multiple, exactly `round((1 - sparsity) * N)` of all N channels are kept, or that
    share of each group under the scope `"layer"` (and `"row"`). With any other, as few are removed in the order of the
    scores as are needed to remove the share; widths go to the nearest multiple.

    Args:
        scores: [channels] by name of the group; larger = keep. Ties keep the earlier channel.
        sparsity: share to remove, in the unit of the pattern.
        scope: `"global"`, or `"layer"` for the same share of channels in each group.
        pattern: groups, unit and multiple.

    Returns:
        Bool tensors like the scores.

    Raises:
        ValueError: the share cannot be removed without emptying a layer, or a score is NaN.
    """
    if any(score.isnan().any() for score in scores.values()):
        raise ValueError(NAN_SCORES)
    ranks = {name: score.sort(descending=True, stable=True).indices for name, score in scores.items()}
    widths = _fitting_widths(scores, sparsity, scope, pattern)
    return {
        name: torch.zeros_like(score, dtype=torch.bool).index_fill_(0, ranks[name][: widths[name]], True)
        for name, score in scores.items()
    }


def _fitting_widths(scores: Mapping[str, Tensor], sparsity: float, scope: str, pattern: Channels) -> dict[str, int]:
    """Find the largest widths that the sparsity leaves room for."""
    total = sum(group.size for group in pattern.groups)
    if scope in _BY_LAYER and pattern.unit == CHANNELS:
        return _widths_by_share(pattern, sparsity)
    at = (
        _global_widths(scores, pattern)
        if scope not in _BY_LAYER
        else lambda level: _widths_by_share(pattern, 1 - level / total)
    )
    whole = pattern.cost({group.name: group.size for group in pattern.groups})
    room = kept_count(total, sparsity) if pattern.unit == CHANNELS else (1 - sparsity) * whole
    level = bisect_right(range(total + 1), room, key=lambda level: pattern.cost(at(level))) - 1
    if level < 0:
        least = pattern.cost(at(0))
        raise ValueError(
            f"`sparsity` is {sparsity:.4g} of the {pattern.unit}, and at most {1 - least / whole:.4g} can be removed "
            f"while every layer keeps {pattern.multiple if pattern.multiple > 1 else 'a channel'}; lower it."
        )
    return at(level)


def _widths_by_share(pattern: Channels, sparsity: float) -> dict[str, int]:
    return {group.name: _rounded(kept_count(group.size, sparsity), group, pattern) for group in pattern.groups}


def _global_widths(scores: Mapping[str, Tensor], pattern: Channels) -> Callable[[int], dict[str, int]]:
    """Return a function of how many channels of all groups are kept, in the order of their scores."""
    groups = pattern.groups
    ids = torch.cat([torch.full((group.size,), index) for index, group in enumerate(groups)])
    values = torch.cat([scores[group.name].detach().double().cpu() for group in groups])
    ids = ids[values.sort(descending=True, stable=True).indices]

    def at(level: int) -> dict[str, int]:
        counts = torch.bincount(ids[:level], minlength=len(groups)).tolist()
        return {group.name: _rounded(count, group, pattern) for group, count in zip(groups, counts, strict=True)}

    return at


def _rounded(count: int, group: ChannelGroup, pattern: Channels) -> int:
    """Round to the nearest multiple, at least one of it; all channels where that is nearer."""
    step = pattern.step(group)
    nearest = max(step, (count + step // 2) // step * step)
    return group.size if nearest > group.size or count == group.size else nearest
