"""Channels that can be removed together, and the pattern `"channels"` that ranks them.

A group holds channels of one kind, such as the neurons of an MLP, and the slices of every tensor that belong to each:
those that write the channel (rows, biases, BatchNorm) and those that read it (columns). A channel whose columns are
zero has no effect, whatever lies between, so a masked model gives the logits of one that the channel is cut out of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import sharding
from .pattern import Pattern

CHANNELS = "channels"
UNITS = (CHANNELS, "parameters", "macs")
"""Units of the sparsity of channels."""


@dataclass(frozen=True)
class ChannelSlices:
    """Slices of one tensor that belong to the channels of a group: `width` neighbours each, in order of the channels.

    Args:
        tensor: name of the parameter or buffer.
        dim: 0 where it writes the channels, 1 where it reads them.
        offset: index of the first slice along the dimension.
        width: indices that one channel takes, such as the size of an attention head.
    """

    tensor: str
    dim: int
    offset: int
    width: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can each be removed from all the tensors that share them.

    Args:
        size: number of channels.
        weights: slices of weights that are pruned, those that write the channels first; the first names the group. At
            least one weight reads the channels, and those that do read nothing else.
        others: slices of biases, BatchNorm and the like, which are cut but not masked.
    """

    size: int
    weights: tuple[ChannelSlices, ...]
    others: tuple[ChannelSlices, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the first weight."""
        return self.weights[0].tensor

    @property
    def members(self) -> tuple[ChannelSlices, ...]:
        """Return all slices."""
        return self.weights + self.others

    @property
    def readers(self) -> tuple[str, ...]:
        """Return the names of the weights that read the channels."""
        return tuple(part.tensor for part in self.weights if part.dim == 1)

    def part(self, slices: ChannelSlices, tensor: Tensor) -> Tensor:
        """Arrange the slices of a tensor as [channels, entries of each]."""
        return (
            tensor.narrow(slices.dim, slices.offset, self.size * slices.width)
            .movedim(slices.dim, 0)
            .reshape(self.size, -1)
        )

    def sum(self, values: Callable[[str], Tensor]) -> Tensor:
        """Sum values of the weights over each channel: [channels], float32 or wider."""
        return torch.stack([_summed(self.part(part, values(part.tensor))) for part in self.weights]).sum(0)

    def kept_indices(self, slices: ChannelSlices, kept: Tensor) -> Tensor:
        """Return the indices of the slices that belong to kept channels, in order."""
        return slices.offset + kept.repeat_interleave(slices.width).nonzero().flatten()


def _summed(parts: Tensor) -> Tensor:
    return parts.sum(1, dtype=torch.promote_types(parts.dtype, torch.float32))


@dataclass(frozen=True)
class InputChannels(Pattern):
    """Groups of one weight along its input dimension: those of the learned scores of channels.

    Args:
        size: number of channels; each has the same number of neighbouring inputs.
    """

    size: int

    spans_rows = True

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over each channel: [channels], float32 or wider."""
        return _summed(values.movedim(1, 0).reshape(self.size, -1))

    def expand(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Repeat the value of each channel over its columns."""
        columns = groups.repeat_interleave(shape[1] // self.size)
        return columns.view(1, -1, *[1] * (len(shape) - 2)).expand(shape).contiguous()


@dataclass(frozen=True)
class TensorCost:
    """Shape of a tensor, and how often one image is multiplied by each entry."""

    shape: tuple[int, ...]
    positions: int


@dataclass(frozen=True)
class Channels(Pattern):
    """`"channels"`: channels of convolutions, neurons of MLPs and attention heads, with all that belongs to them.

    The score of a channel is the sum over all its weights. Where scores are learned, each weight that reads channels
    holds one for every channel, and that of a channel is their sum; so channels that one weight reads, as all within
    blocks do, have one score. Until masks are frozen only the columns of a pruned channel are masked: with its rows
    masked, too, it would get no gradient and could not come back.

    Args:
        groups: groups of channels; none stands for the pattern of any model.
        unit: unit of the sparsity, out of [`UNITS`]: the share of channels, or of the parameters or
            multiply-accumulates (of linear and convolution layers) of the whole model, that is removed.
        multiple: number that the width of every layer is a multiple of, unless the layer stays whole.
        costs: all parameters of the model by name, for the other units than channels.
    """

    groups: tuple[ChannelGroup, ...] = ()
    unit: str = CHANNELS
    multiple: int = 1
    costs: Mapping[str, TensorCost] = field(default_factory=dict, hash=False)

    spans_rows = True

    @property
    def name(self) -> str:
        """Return `"channels"`."""
        return CHANNELS

    @cached_property
    def _weights(self) -> frozenset[str]:
        return frozenset(part.tensor for group in self.groups for part in group.weights)

    @cached_property
    def _read_by(self) -> dict[str, ChannelGroup]:
        return {reader: group for group in self.groups for reader in group.readers}

    def check(self, sparsity: float, scope: str) -> None:
        """Refuse scope `"erk"`, which follows from the shapes of weights.

        Raises:
            ValueError: the scope is `"erk"`.
        """
        if scope == "erk":
            raise ValueError(
                "`scope='erk'` follows from the shapes of weights, and `pattern='channels'` ranks channels; use "
                "'global' or 'layer'."
            )

    def fits(self, weight: str, shape: torch.Size) -> bool:
        """Return whether the weight writes or reads channels that can be removed."""
        return weight in self._weights

    def learns(self, weight: str) -> bool:
        """Return whether the weight reads channels."""
        return weight in self._read_by

    def of(self, weight: str) -> Pattern:
        """Return the pattern of the learned scores of a weight that reads channels."""
        return InputChannels(self._read_by[weight].size)

    def start(self, weight: str, values: Callable[[str], Tensor]) -> Tensor:
        """Return the mean of the absolute values of each channel, divided by the number of weights that read it."""
        group = self._read_by[weight]
        parts = [group.part(part, values(part.tensor)).abs() for part in group.weights]
        return torch.cat(parts, dim=1).float().mean(1) / len(group.readers)

    def sums(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum values of all weights over each channel: [channels] by the name of the group."""
        return {group.name: group.sum(values.__getitem__) for group in self.groups}

    def merged(self, scores: Mapping[str, Tensor], magnitude: bool) -> dict[str, Tensor]:
        """Sum learned scores, or their absolute values, over the weights that read each channel: [channels]."""
        parts = {name: score.abs() if magnitude else score for name, score in scores.items()}
        return {group.name: torch.stack([parts[reader] for reader in group.readers]).sum(0) for group in self.groups}

    def expanded(self, groups: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the weights all of whose channels are kept."""
        masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
        for group in self.groups:
            kept = groups[group.name].cpu()
            for part in group.weights:
                index = (~kept).repeat_interleave(part.width).nonzero().flatten() + part.offset
                masks[part.tensor].index_fill_(part.dim, index, False)
        return {name: mask.to(weights[name].device) for name, mask in masks.items()}

    def applied(self, groups: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep the columns of kept channels in the weights that read them."""
        return {
            name: self.of(name).expand(groups[self._read_by[name].name], weight.shape)
            for name, weight in weights.items()
        }

    def completed(self, applied: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks of all weights from those of [`Channels.applied`]."""
        kept = {
            group.name: self.of(reader).sum(sharding.whole(applied[reader])) > 0
            for group in self.groups
            for reader in group.readers[:1]
        }
        return self.expanded(kept, weights)

    def kept(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which channels have any weight left in masks of all weights: bool [channels] by name of the group."""
        return {name: sums > 0 for name, sums in self.sums(masks).items()}

    def broken(self, masks: Mapping[str, Tensor]) -> str | None:
        """Return the first weight of a mask that cuts through channels, if any."""
        expected = self.expanded(self.kept(masks), masks)
        return next((name for name, mask in masks.items() if not torch.equal(mask, expected[name])), None)

    def take_rows(self, scores: Tensor, shape: torch.Size, rows: Tensor) -> Tensor:
        """Return the scores as they are, because they belong to columns."""
        return scores

    # Widths ----------------------------------------------------------------------------------------------------------

    def widths(self, kept: Mapping[str, Tensor]) -> dict[str, int]:
        """Count the kept channels of each group."""
        return {name: int(channels.sum()) for name, channels in kept.items()}

    def step(self, group: ChannelGroup) -> int:
        """Return the number of channels that a width is a multiple of, at most all."""
        width = min(part.width for part in group.weights)
        return min(self.multiple // math.gcd(self.multiple, width), group.size)

    def cost(self, widths: Mapping[str, int]) -> int:
        """Compute what is left in the unit of the pattern: channels, or entries times positions of all tensors.

        Args:
            widths: number of kept channels by name of the group.
        """
        if self.unit == CHANNELS:
            return sum(widths.values())
        shapes = self.shapes(widths)
        return sum(
            math.prod(shapes.get(name, cost.shape)) * (cost.positions if self.unit == "macs" else 1)
            for name, cost in self.costs.items()
        )

    def shapes(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        """Compute the shapes of the tensors in `costs` that channels are cut out of.

        Args:
            widths: number of kept channels by name of the group.
        """
        shapes: dict[str, list[int]] = {}
        for group in self.groups:
            if lost := group.size - widths[group.name]:
                for part in group.members:
                    if part.tensor in self.costs:
                        shape = shapes.setdefault(part.tensor, list(self.costs[part.tensor].shape))
                        shape[part.dim] -= lost * part.width
        return shapes

    def cut(self, kept: Mapping[str, Tensor]) -> tuple[ChannelGroup, ...]:
        """Return the groups as they are once other channels than those kept are cut out."""
        lost = [
            (part, (group.size - int(kept[group.name].sum())) * part.width)
            for group in self.groups
            for part in group.members
        ]

        def moved(part: ChannelSlices) -> ChannelSlices:
            before = sum(
                count
                for other, count in lost
                if (other.tensor, other.dim) == (part.tensor, part.dim) and other.offset < part.offset
            )
            return replace(part, offset=part.offset - before)

        return tuple(
            ChannelGroup(
                int(kept[group.name].sum()), tuple(map(moved, group.weights)), tuple(map(moved, group.others))
            )
            for group in self.groups
        )


def as_rows(groups: Iterable[ChannelGroup]) -> list[list[Any]]:
    """Return groups as JSON values: size, slices of weights, and slices of other tensors."""
    return [
        [group.size, *([list(astuple(part)) for part in parts] for parts in (group.weights, group.others))]
        for group in groups
    ]


def take_kept(
    groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Cut channels out of tensors.

    Args:
        groups: groups of channels.
        kept: bool tensor [channels] by name of the group, True where a channel stays.
        tensors: tensors by name, all of those that the groups name.

    Returns:
        The tensors that the groups name, smaller; the others as they are.
    """
    lost: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        for part in group.members:
            lost.setdefault((part.tensor, part.dim), []).append(group.kept_indices(part, ~kept[group.name].cpu()))
    cut = dict(tensors)
    for (name, dim), indices in lost.items():
        stays = torch.ones(cut[name].shape[dim], dtype=torch.bool)
        stays[torch.cat(indices)] = False
        cut[name] = cut[name].index_select(dim, stays.nonzero().flatten().to(cut[name].device))
    return cut
