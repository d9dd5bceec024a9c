"""Select masks of exactly the k largest entries of one or several tensors.

On a CPU the threshold is bracketed by a random sample, one pass marks what lies above the bracket, and only the few
entries within it are ranked: several times faster than a k-th value over everything, and just as exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..values import FRACTION, is_number, require

NAN_SCORES = "Scores contain NaN, so no mask can be selected; lower the learning rate of the scores."
# Entries processed at a time, so that temporaries stay in the cache.
_PIECE = 2**17
# Size of the sample that brackets the threshold; smaller selections rank all entries.
_SAMPLE = 2**16
# Standard deviations of the sample's quantile on either side of the threshold; a miss costs time, not exactness.
_DEVIATIONS = 5


def kept_count(total: int, sparsity: float) -> int:
    """Return the number of weights kept out of `total`: `round((1 - sparsity) * total)`, half to even.

    Raises:
        ValueError: `sparsity` is not in [0, 1].
    """
    if not is_number(sparsity, 0, 1):
        require("sparsity", sparsity, FRACTION)
    return round((1 - sparsity) * total)


@torch.no_grad()
def top_k_mask(values: Sequence[Tensor], count: int, magnitude: bool = False) -> list[Tensor]:
    """Select the `count` largest entries of all tensors together.

    Args:
        values: tensors of any shape, memory format and floating-point type, on one device.
        count: number of entries to keep, from 0 to all.
        magnitude: whether absolute values are ranked.

    Returns:
        One contiguous bool tensor for each, of its shape. Ties go to the earlier tensor, then to the lower row-major
        index.

    Raises:
        ValueError: an entry is NaN.
    """
    common = reduce(torch.promote_types, (value.dtype for value in values))
    flat = [value.detach().reshape(-1).to(common) for value in values]
    if flat[0].device.type != "cpu":
        everything = torch.cat(flat)
        kept = _keep_in_vector(everything.abs() if magnitude else everything, count)
        masks = [part.clone() for part in kept.split([part.numel() for part in flat])]
    else:
        masks = _keep_within_bracket(flat, count, magnitude)
    return [mask.view(value.shape) for mask, value in zip(masks, values, strict=True)]


def _keep_in_vector(values: Tensor, count: int) -> Tensor:
    """Mark the `count` largest entries in a bool vector; ties go to the lower index."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = kth_smallest(values, values.numel() - count)
    mask = values >= threshold
    surplus = int(mask.count_nonzero()) - count
    if surplus < 0:
        # NaN ranks above every number but compares with none.
        raise ValueError(NAN_SCORES)
    if surplus:
        ties = (values == threshold).nonzero().squeeze(1)
        mask[ties[len(ties) - surplus :]] = False
    return mask


def kth_smallest(values: Tensor, index: int) -> Tensor:
    """Return the entry at an index (from 0) of the sorted vector."""
    if values.device.type != "cpu":
        return values.kthvalue(index + 1).values
    # numpy's vectorised selection is several times faster than torch's on a CPU.
    return torch.tensor(np.partition(values.numpy(), index)[index])


class _Piece(NamedTuple):
    """A slice of one tensor and of its mask."""

    values: Tensor
    mask: np.ndarray


def _array(values: Tensor) -> np.ndarray:
    """Convert values to numpy; half precision widens exactly."""
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).numpy()


def _keep_within_bracket(flat: Sequence[Tensor], count: int, magnitude: bool) -> list[Tensor]:
    masks = [torch.empty(value.shape, dtype=torch.bool) for value in flat]
    pieces = [
        _Piece(value[start : start + _PIECE], mask.numpy()[start : start + _PIECE])
        for value, mask in zip(flat, masks, strict=True)
        for start in range(0, value.numel(), _PIECE)
    ]
    for low, high in (_bracket(flat, count, magnitude), (-math.inf, math.inf)):
        found = _in_threads(lambda stretch: _mark(stretch, magnitude, low, high), pieces)  # noqa: B023  # used at once
        missing = count - sum(above for above, _, _ in found)
        within = np.concatenate([values for _, _, values in found]) if found else np.empty(0, dtype=np.float32)
        if np.isnan(within).any():
            raise ValueError(NAN_SCORES)
        if 0 <= missing <= len(within):
            break
    kept, start = _keep_in_vector(torch.from_numpy(within), missing).numpy(), 0
    for piece, (_, positions, _) in zip(pieces, found, strict=True):
        piece.mask[positions] = kept[start : start + len(positions)]
        start += len(positions)
    return masks


def _bracket(flat: Sequence[Tensor], count: int, magnitude: bool) -> tuple[float, float]:
    """Estimate bounds of the `count`-th largest entry from a random sample."""
    total = sum(value.numel() for value in flat)
    if total <= _SAMPLE:
        return -math.inf, math.inf
    generator = np.random.default_rng(0)
    sample = np.concatenate(
        [
            _array(value[torch.from_numpy(generator.integers(value.numel(), size=size))])
            for value in flat
            for size in [math.ceil(_SAMPLE * value.numel() / total)]
            if size
        ]
    )
    sample = np.abs(sample) if magnitude else sample
    share = 1 - count / total
    middle, spread = share * len(sample), _DEVIATIONS * math.sqrt(share * (1 - share) * len(sample)) + 1
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    ordered = np.partition(sample, [max(first, 0), min(last, len(sample) - 1)])
    return (
        float(ordered[first]) if first >= 0 else -math.inf,
        float(ordered[last]) if last < len(sample) else math.inf,
    )


def _mark(
    pieces: Sequence[_Piece], magnitude: bool, low: float, high: float
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Mark and count the entries above the bracket, and list positions and values of those within it."""
    found = []
    # Buffers that every piece reuses, because allocating costs more than all comparisons.
    magnitudes, below = np.empty(_PIECE, _array(pieces[0].values[:0]).dtype), np.empty(_PIECE, dtype=bool)
    for piece in pieces:
        values, size = _array(piece.values), piece.mask.size
        if magnitude:
            values = np.abs(values, out=magnitudes[:size])
        np.greater(values, high, out=piece.mask)
        # Neither below nor above; this includes NaN.
        within = np.equal(np.less(values, low, out=below[:size]), piece.mask, out=below[:size])
        positions = np.flatnonzero(within)
        found.append((int(np.count_nonzero(piece.mask)), positions, values[positions]))
    return found


def overwrite_masks(masks: Mapping[str, Tensor], selected: Mapping[str, Tensor]) -> int:
    """Copy bool tensors into others of the same names and shapes and return the number of entries that changed."""
    flips = _count_differences([(mask, selected[name]) for name, mask in masks.items()])
    for name, mask in masks.items():
        mask.copy_(selected[name])
    return flips


def _count_differences(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    if pairs[0][0].device.type != "cpu":
        return sum(int((first != second).count_nonzero()) for first, second in pairs)
    # torch counts on a CPU by widening every flag to eight bytes.
    arrays = [(first.reshape(-1).numpy(), second.reshape(-1).numpy()) for first, second in pairs]
    pieces = [
        (first[start : start + _PIECE], second[start : start + _PIECE])
        for first, second in arrays
        for start in range(0, first.size, _PIECE)
    ]
    return sum(_in_threads(_differences, pieces))


def _differences(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    differs = np.empty(_PIECE, dtype=bool)
    return [int(np.count_nonzero(np.not_equal(first, second, out=differs[: first.size]))) for first, second in pieces]


def _in_threads(function: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
    """Apply a function to slices of all items, in as many threads as torch uses, and concatenate the results."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return function(items) if items else []
    ends = [len(items) * thread // threads for thread in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda start, end: function(items[start:end]), ends[:-1], ends[1:])
        return [result for part in parts for result in part]
