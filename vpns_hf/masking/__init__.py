"""Masks over weights: find the prunable ones, attach scores, select exactly k, freeze, fold.

A backbone is in one of three states. *Dense*: plain weights. *Search*: each prunable weight is parametrized by
`MaskedWeight`, which holds learnable scores and the mask. *Frozen*: weights are plain again with the zeros written in,
each beside a bool buffer `<name>_mask`, and their gradients are masked. Everywhere a weight is known by the name it
has in the dense backbone.
"""

from .frozen import (
    ZEROS_LOST,
    change_frozen_masks,
    check_masks,
    check_pattern,
    check_state,
    check_zeros,
    freeze,
    frozen_masks,
    guard_states,
    mask_gradients,
    nonzero_or_kept,
    unfreeze,
    zero_masked_weights,
)
from .pattern import Pattern
from .patterns import UNSTRUCTURED, get_pattern
from .prunable import MASK_SUFFIX, PrunableWeight, all_kept, dense_state, find_prunable_weights, stored_weight
from .search import MaskedWeight, attach_scores, detach_scores, masked_weights, scored, shard_masks, update_masks
from .selection import SCOPES, erk_densities, select_masks, split_like
from .topk import kept_count

__all__ = [
    "MASK_SUFFIX",
    "SCOPES",
    "UNSTRUCTURED",
    "ZEROS_LOST",
    "MaskedWeight",
    "Pattern",
    "PrunableWeight",
    "all_kept",
    "attach_scores",
    "change_frozen_masks",
    "check_masks",
    "check_pattern",
    "check_state",
    "check_zeros",
    "dense_state",
    "detach_scores",
    "erk_densities",
    "find_prunable_weights",
    "freeze",
    "frozen_masks",
    "get_pattern",
    "guard_states",
    "kept_count",
    "mask_gradients",
    "masked_weights",
    "nonzero_or_kept",
    "scored",
    "select_masks",
    "shard_masks",
    "split_like",
    "stored_weight",
    "unfreeze",
    "update_masks",
    "zero_masked_weights",
]
