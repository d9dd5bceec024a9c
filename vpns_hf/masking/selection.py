"""Select exactly k weights or groups of them by score: globally, per layer, per row or by ERK densities."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..values import one_of, require, shortened
from . import sharding
from .channel_selection import select_channels
from .channels import Channels
from .pattern import Pattern
from .patterns import UNSTRUCTURED
from .sharded_topk import RankedGroup, refuse_nan, select_on_shards
from .topk import NAN_SCORES, kept_count, top_k_mask


def erk_densities(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
    """Compute Erdos-Renyi-kernel densities, proportional to `sum(shape) / prod(shape)` (RigL, arXiv 1911.11134).

    Tensors that would need a density above 1 are made dense, the largest ratio first, and the rest is rescaled so that
    the total stays `(1 - sparsity) * N`.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ratios = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    budget, dense = (1 - sparsity) * sum(sizes.values()), set[str]()
    while len(dense) < len(sizes):
        rest = [name for name in sizes if name not in dense]
        scale = (budget - sum(sizes[name] for name in dense)) / sum(ratios[name] * sizes[name] for name in rest)
        largest = max(ratios[name] for name in rest)
        if scale * largest <= 1:
            return {name: 1.0 if name in dense else scale * ratios[name] for name in sizes}
        dense |= {name for name in rest if ratios[name] == largest}
    return dict.fromkeys(sizes, 1.0)


def _layer_counts(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, int]:
    return {name: kept_count(math.prod(shape), sparsity) for name, shape in shapes.items()}


def _erk_counts(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, int]:
    ideal = {name: density * math.prod(shapes[name]) for name, density in erk_densities(shapes, sparsity).items()}
    counts = {name: math.floor(value) for name, value in ideal.items()}
    missing = kept_count(sum(math.prod(shape) for shape in shapes.values()), sparsity) - sum(counts.values())
    by_remainder = sorted(ideal, key=lambda name: counts[name] - ideal[name])
    return counts | {name: counts[name] + 1 for name in by_remainder[:missing]}


_COUNTS = {"layer": _layer_counts, "erk": _erk_counts}
SCOPES = ("global", *_COUNTS, "row")


def _keep_largest_in_rows(score: Tensor, sparsity: float) -> Tensor:
    """Mark the largest entries of each row of [rows, ...] in a bool tensor; ties go to the lower index."""
    rows = score.flatten(1)
    if rows.isnan().any():
        raise ValueError(NAN_SCORES)
    kept = rows.sort(dim=1, descending=True, stable=True).indices[:, : kept_count(rows.shape[1], sparsity)]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, kept, True).view(score.shape)


@torch.no_grad()
def select_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "global",
    pattern: Pattern = UNSTRUCTURED,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Select masks that keep exactly the largest scores.

    Args:
        scores: one tensor of any shape, dtype and memory format per weight; larger = keep (no absolute value is
            taken). Sharded ones (FSDP2) are ranked where they are, without gathering them; all processes call this
            together.
        sparsity: fraction to remove, in [0, 1]; `round((1 - sparsity) * N)` weights are kept.
        scope: `"global"` ranks all tensors together; `"layer"` keeps that count in each tensor; `"erk"` keeps the
            global count, spread over tensors by [`erk_densities`] and rounded by largest remainder; `"row"` keeps
            `round((1 - sparsity) * row)` in each output row, which is the first dimension with all others flattened.
        pattern: pattern of the masks, of [`get_pattern`]. Groups of weights are ranked by the sum of their scores, and
            N, shapes and rows are those of groups.
        within: earlier masks; groups that these prune come last, as their scores of 0 are more than negative ones.

    Returns:
        One contiguous bool tensor per score, sharded as it is, True where the weight is kept. Ties are broken by the
        order of the dictionary, then by row-major index.

    Raises:
        ValueError: sparsity outside [0, 1] or above that of the pattern, unknown scope, no scores, or NaN among them.
    """
    _check_scores(scores, scope)
    groups = _sums(scores, pattern)
    if within is not None:
        counts = _sums(within, pattern)
        groups = {name: score.masked_fill(counts[name] == 0, -math.inf) for name, score in groups.items()}
    kept = select(groups, sparsity, scope, pattern, magnitude=False)
    return split_like(pattern.expanded(kept, scores), scores)


def _sums(values: Mapping[str, Tensor], pattern: Pattern) -> Mapping[str, Tensor]:
    # Groups that span rows may lie on several processes.
    return pattern.sums(_gathered(values) if pattern.spans_rows else values)


def split_like(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard masks like the tensors `weights`."""
    return {name: sharding.split_like(mask, weights[name]) for name, mask in masks.items()}


def _gathered(scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: sharding.whole(score) for name, score in scores.items()}


def _check_scores(scores: Mapping[str, Tensor], scope: str) -> None:
    if not isinstance(scores, Mapping) or not all(isinstance(score, Tensor) for score in scores.values()):
        raise ValueError(f"The scores are {shortened(scores)}; expected a dictionary of tensors by weight name.")
    if complex_ones := [name for name, score in scores.items() if score.is_complex()]:
        raise ValueError(f"The scores of {complex_ones[0]} are complex numbers, which have no order.")
    if not scores:
        raise ValueError("No scores were given, so there is nothing to select.")
    require("scope", scope, one_of(SCOPES))


def select(
    scores: Mapping[str, Tensor], sparsity: float, scope: str, pattern: Pattern, magnitude: bool
) -> dict[str, Tensor]:
    """Select masks of groups by their scores, or absolute scores where `magnitude` is True; see [`select_masks`].

    Masks are sharded as the scores are, or whole where groups span rows.
    """
    pattern.check(sparsity, scope)
    if pattern.spans_rows:
        scores = _gathered(scores)
    if isinstance(pattern, Channels):
        return select_channels(_ranked(scores, magnitude), sparsity, scope, pattern)
    if pattern.sparsity is not None:
        scores, magnitude = _guaranteed(_ranked(scores, magnitude), pattern), False
    if sharding.is_sharded(scores.values()):
        return _select_sharded_masks(_ranked(scores, magnitude), sparsity, scope)
    if scope == "row":
        ranked = _ranked(scores, magnitude)
        return {name: _keep_largest_in_rows(score, sparsity) for name, score in ranked.items()}
    if scope == "global":
        count = kept_count(sum(score.numel() for score in scores.values()), sparsity)
        return dict(zip(scores, top_k_mask(list(scores.values()), count, magnitude), strict=True))
    counts = _COUNTS[scope]({name: score.shape for name, score in scores.items()}, sparsity)
    return {name: top_k_mask([score], counts[name], magnitude)[0] for name, score in scores.items()}


def _ranked(scores: Mapping[str, Tensor], magnitude: bool) -> Mapping[str, Tensor]:
    return {name: score.abs() for name, score in scores.items()} if magnitude else scores


def _guaranteed(scores: Mapping[str, Tensor], pattern: Pattern) -> Mapping[str, Tensor]:
    """Return the scores as the pattern ranks them; every row is whole on one process."""
    return {name: sharding.join_like(pattern.ranked(sharding.local(score)), score) for name, score in scores.items()}


def _select_sharded_masks(scores: Mapping[str, Tensor], sparsity: float, scope: str) -> dict[str, Tensor]:
    shards = sharding.shards_of(scores.values())
    parts = {name: sharding.local(score) for name, score in scores.items()}
    if scope == "row":
        # Every row is whole on one process.
        refuse_nan(parts.values(), shards)
        selected = {name: _keep_largest_in_rows(part, sparsity) for name, part in parts.items()}
    else:
        selected = select_on_shards(parts, _ranked_groups(scores, sparsity, scope), shards)
    return {name: sharding.join_like(mask, scores[name]) for name, mask in selected.items()}


def _ranked_groups(scores: Mapping[str, Tensor], sparsity: float, scope: str) -> list[RankedGroup]:
    if scope == "global":
        total = sum(score.numel() for score in scores.values())
        return [RankedGroup(list(scores), kept_count(total, sparsity))]
    counts = _COUNTS[scope]({name: score.shape for name, score in scores.items()}, sparsity)
    return [RankedGroup([name], counts[name]) for name in scores]
