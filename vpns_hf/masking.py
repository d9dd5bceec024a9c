"""Masks over weights: find the prunable ones, attach scores, select exactly k, freeze, fold.

A backbone is in one of three states. *Dense*: plain weights. *Search*: each prunable weight is parametrized by
`MaskedWeight`, which holds learnable scores and the mask. *Frozen*: weights are plain again with the zeros written in,
each beside a bool buffer `<name>_mask`, and their gradients are masked. This is the only module that knows
`torch.nn.utils.parametrize`. Everywhere a weight is known by the name it has in the dense backbone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import sharding
from .recomputation import can_be_made_again
from .selection import NAN_SCORES, keep_largest, overwrite_masks
from .sharded_selection import RankedGroup, refuse_nan, select_on_shards

MASK_SUFFIX = "_mask"


class Slot(NamedTuple):
    """Where a prunable weight lives: `getattr(module, tensor_name)`."""

    module: nn.Module
    tensor_name: str


# Selection -----------------------------------------------------------------------------------------------------------


def kept_count(total: int, sparsity: float) -> int:
    """Number of weights kept out of `total`: `round((1 - sparsity) * total)`, half to even.

    Raises:
        ValueError: `sparsity` is not in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` is {sparsity}; expected a fraction in [0, 1), such as 0.9 for 90 %.")
    return round((1 - sparsity) * total)


def erk_densities(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-kernel density of each tensor (RigL, arXiv 1911.11134): proportional to `sum(shape) / prod(shape)`.

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
    """Bool tensor that is True at the largest entries of each row of [rows, ...]; ties go to the lower index."""
    rows = score.flatten(1)
    if rows.isnan().any():
        raise ValueError(NAN_SCORES)
    kept = rows.sort(dim=1, descending=True, stable=True).indices[:, : kept_count(rows.shape[1], sparsity)]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, kept, True).view(score.shape)


@torch.no_grad()
def select_masks(scores: Mapping[str, Tensor], sparsity: float, scope: str = "global") -> dict[str, Tensor]:
    """Keep exactly the largest scores.

    Args:
        scores: one tensor of any shape, dtype and memory format per weight; larger = keep (no absolute value is
            taken). Sharded ones (FSDP2) are ranked where they are, without gathering them; all processes call this
            together.
        sparsity: fraction to remove, in [0, 1]; `round((1 - sparsity) * N)` weights are kept.
        scope: `"global"` ranks all tensors together; `"layer"` keeps that count in each tensor; `"erk"` keeps the
            global count, spread over tensors by [`erk_densities`] and rounded by largest remainder; `"row"` keeps
            `round((1 - sparsity) * row)` in each output row, which is the first dimension with all others flattened.

    Returns:
        One contiguous bool tensor per score, sharded as it is, True where the weight is kept. Ties are broken by the
        order of the dictionary, then by row-major index.

    Raises:
        ValueError: sparsity outside [0, 1], unknown scope, no scores, or NaN among them.
    """
    return _select(scores, sparsity, scope, magnitude=False)


def _select(scores: Mapping[str, Tensor], sparsity: float, scope: str, magnitude: bool) -> dict[str, Tensor]:
    if not scores:
        raise ValueError("No scores were given, so there is nothing to select.")
    if scope not in SCOPES:
        raise ValueError(f"`scope` is {scope!r}; expected one of {', '.join(SCOPES)}.")
    if sharding.is_sharded(scores.values()) or scope == "row":
        ranked = {name: score.abs() if magnitude else score for name, score in scores.items()}
        if sharding.is_sharded(scores.values()):
            return _select_sharded_masks(ranked, sparsity, scope)
        return {name: _keep_largest_in_rows(score, sparsity) for name, score in ranked.items()}
    if scope == "global":
        count = kept_count(sum(score.numel() for score in scores.values()), sparsity)
        return dict(zip(scores, keep_largest(list(scores.values()), count, magnitude), strict=True))
    counts = _COUNTS[scope]({name: score.shape for name, score in scores.items()}, sparsity)
    return {name: keep_largest([score], counts[name], magnitude)[0] for name, score in scores.items()}


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


# Prunable weights ----------------------------------------------------------------------------------------------------

_MULTIHEAD_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        # The projection of queries, keys and values is a bare parameter here, a linear layer everywhere else.
        return tuple(name for name in _MULTIHEAD_WEIGHTS if getattr(module, name) is not None)
    return ()


def prunable_slots(
    backbone: nn.Module, ignore_modules: Iterable[str] = (), skip: Iterable[str] = ()
) -> dict[str, Slot]:
    """Weights of linear and convolution layers (never biases, norms, tokens or position embeddings), in module order.

    Args:
        backbone: a model in any state.
        ignore_modules: module names, whole (`"vit.layers.0.mlp"`) or their end (`"patch_embed.proj"`), left out with
            all below them.
        skip: weight names to leave out.

    Raises:
        ValueError: an entry of `ignore_modules` names no module, or two modules share one prunable weight.
    """
    modules = {name: module for name, module in backbone.named_modules() if "parametrizations" not in name.split(".")}
    ignored = {name for entry in ignore_modules for name in _matching_modules(entry, modules)}
    slots, owners = {}, dict[int, str]()
    for name, module in modules.items():
        if any(name == entry or name.startswith(f"{entry}.") for entry in ignored):
            continue
        for tensor_name in _weight_names(module):
            full_name, slot = f"{name}.{tensor_name}".lstrip("."), Slot(module, tensor_name)
            if full_name in set(skip):
                continue
            if (owner := owners.setdefault(id(stored_weight(slot)), full_name)) != full_name:
                raise ValueError(
                    f"{owner} and {full_name} share one weight, which cannot be masked twice; list one in "
                    "`ignore_modules`."
                )
            slots[full_name] = slot
    return slots


def _matching_modules(entry: str, modules: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name in modules if name and (name == entry or name.endswith(f".{entry}"))]
    if not found:
        raise ValueError(
            f"`ignore_modules` names {entry!r}, which is no module of the backbone, such as {max(modules, key=len)!r}."
        )
    return found


def stored_weight(slot: Slot) -> Tensor:
    """The parameter that stores the weight itself, whether or not it is parametrized."""
    if parametrize.is_parametrized(slot.module, slot.tensor_name):
        return _parametrizations(slot).original
    return slot.module.get_parameter(slot.tensor_name)


def all_kept(slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """A mask for each weight that prunes nothing."""
    return {name: torch.ones_like(stored_weight(slot), dtype=torch.bool) for name, slot in slots.items()}


def _parametrizations(slot: Slot) -> parametrize.ParametrizationList:
    by_tensor = cast(nn.ModuleDict, slot.module.parametrizations)
    return cast(parametrize.ParametrizationList, by_tensor[slot.tensor_name])


def dense_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that they have in the dense backbone; scores and masks are left out."""
    state = {}
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if name.endswith((".0.scores", ".0.mask")) and "parametrizations" in name.split("."):
            continue
        state[name.replace("parametrizations.", "").removesuffix(".original")] = tensor
    masks = {name + MASK_SUFFIX for name in state}
    return {name: tensor for name, tensor in state.items() if name not in masks}


# Zeros ---------------------------------------------------------------------------------------------------------------

# On a CPU the bits of a number are multiplied by those of its mask, which is 0 or 1: `torch.where` and `masked_fill_`
# give the same but are not vectorized and take several times as long.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """The tensor with zeros where the bool tensor of its shape is False, infinities and NaN included."""
    if not _has_plain_bits(tensor) or sharding.is_sharded([mask]):
        return torch.where(mask, tensor, 0)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    return torch.empty_like(bits).copy_(mask.view(torch.uint8)).mul_(bits).view(tensor.dtype)


def _has_plain_bits(tensor: Tensor) -> bool:
    """Whether the tensor lies on a CPU, and nothing follows what is done with it."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        # Integers have no gradient, which second derivatives need here.
        and not (tensor.requires_grad and torch.is_grad_enabled())
        # Those of vmap, which vectorized Jacobians take, have no memory of their own.
        and torch._C._has_storage(tensor)
    )


def write_zeros(tensor: Tensor, mask: Tensor) -> None:
    """Write zeros into a tensor where the bool tensor of its shape is False."""
    if tensor.device.type != "cpu":
        tensor.masked_fill_(~mask, 0)
    else:
        tensor.view(_INTEGERS[tensor.element_size()]).mul_(mask.view(torch.uint8))


# Search state --------------------------------------------------------------------------------------------------------


class _StraightThroughMask(torch.autograd.Function):
    """Forward `weight * mask`, backward as if the mask were the scores (|scores| unless they are signed).

    So dL/dscores = weight * dL/dmasked * sign(scores), for kept and pruned weights alike (HYDRA, arXiv 2002.10509),
    less the implicit gradient of BiP (arXiv 2210.04092), `implicit * mask * dL/dmasked`, from the weight.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor, signed: bool, implicit: float) -> Tensor:
        ctx.save_for_backward(weight, scores, mask)
        ctx.signed, ctx.implicit = signed, implicit
        return masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, scores, mask = ctx.saved_tensors
        kept_grad = masked(grad, mask) if ctx.needs_input_grad[0] or ctx.implicit else None
        score_grad = None
        if ctx.needs_input_grad[1]:
            response = weight if kept_grad is None or not ctx.implicit else weight - ctx.implicit * kept_grad
            # In place, because fresh memory costs more than the products.
            score_grad = grad.to(scores.dtype, copy=True) if ctx.signed else scores.sign().mul_(grad)
            score_grad.mul_(response)
        return kept_grad if ctx.needs_input_grad[0] else None, score_grad, None, None, None


class MaskedWeight(nn.Module):
    """Parametrization of one weight by a mask, with the scores that the mask is selected from.

    Args:
        scores: float32 tensor of the weight's shape; becomes a parameter.
        signed: rank the scores themselves, not their absolute values.

    Attributes:
        implicit_gradient: BiP's 1 / gamma, the weight of the implicit gradient in the gradient of the scores.
    """

    def __init__(self, scores: Tensor, signed: bool = False):
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(scores, dtype=torch.bool))
        self.signed = signed
        self.implicit_gradient = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros where the mask is False."""
        # FSDP2 gathers parameters for the forward of their block, but no buffers.
        mask = sharding.arranged_like(self.mask, weight)
        result = _StraightThroughMask.apply(weight, self.scores, mask, self.signed, self.implicit_gradient)
        can_be_made_again(result, masked, weight, mask)
        return result


def initial_scores(weight: Tensor) -> Tensor:
    """HYDRA's scaled initialisation (arXiv 2002.10509), `sqrt(6 / fan_in) * weight / max|weight|`, in float32.

    Args:
        weight: [out, in, ...]; fan_in is the product of all but the first dimension.
    """
    weight = weight.detach().float()
    fan_in = math.prod(weight.shape[1:])
    return math.sqrt(6 / fan_in) * weight / weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


def attach_scores(slots: Mapping[str, Slot], signed: bool = False) -> None:
    """Dense to search: parametrize every weight with [`MaskedWeight`], all weights kept until a mask is selected.

    Scores start at [`initial_scores`]; signed ones at zero (movement pruning, arXiv 2005.07683).
    """
    for slot in slots.values():
        scores = initial_scores(stored_weight(slot))
        masked = MaskedWeight(torch.zeros_like(scores) if signed else scores, signed)
        parametrize.register_parametrization(slot.module, slot.tensor_name, masked, unsafe=True)


def detach_scores(slots: Mapping[str, Slot]) -> None:
    """Search to dense: drop scores and masks and restore the weights as they are stored."""
    # Backwards, so that several weights of one module end in their own order.
    for slot in reversed(list(slots.values())):
        _unshare_class(slot.module)
        parametrize.remove_parametrizations(slot.module, slot.tensor_name, leave_parametrized=False)
        _move_to_front(slot.module._parameters, slot.tensor_name)


def _unshare_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch makes the weight a property of a class made for the module, but copies of the module share that class, so
    that dropping the property from a copy would drop it from the original, too.
    """
    shared = type(module)
    members = {name: member for name, member in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def _move_to_front(parameters: dict[str, Any], name: str) -> None:
    """Undo that torch puts a weight that was parametrized behind the bias: optimizers go by the order."""
    for other in [other for other in parameters if other != name]:
        parameters[other] = parameters.pop(other)


def masked_weights(slots: Mapping[str, Slot]) -> dict[str, MaskedWeight]:
    """The parametrization of each weight, by weight name; search state only."""
    return {name: cast(MaskedWeight, _parametrizations(slot)[0]) for name, slot in slots.items()}


@torch.no_grad()
def update_masks(slots: Mapping[str, Slot], sparsity: float, scope: str) -> int:
    """Select the masks anew from the scores and return how many entries changed."""
    masked = masked_weights(slots)
    signed = any(part.signed for part in masked.values())
    selected = _select({name: part.scores for name, part in masked.items()}, sparsity, scope, magnitude=not signed)
    return _overwrite({name: part.mask for name, part in masked.items()}, selected)


def _overwrite(masks: Mapping[str, Tensor], selected: Mapping[str, Tensor]) -> int:
    if not sharding.is_sharded(masks.values()):
        return overwrite_masks(masks, selected)
    flips = sharding.count_true(mask ^ selected[name] for name, mask in masks.items())
    for name, mask in masks.items():
        mask.copy_(selected[name])
    return flips


# Frozen state --------------------------------------------------------------------------------------------------------


def check_masks(masks: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> None:
    """Refuse masks that do not belong to these weights.

    Raises:
        ValueError: names or shapes differ.
    """
    if unknown := sorted(set(masks) ^ set(slots)):
        raise ValueError(
            f"Masks must name exactly the {len(slots)} prunable weights of this model; {len(unknown)} names differ, "
            f"such as {unknown[0]}."
        )
    for name, slot in slots.items():
        if masks[name].shape != (shape := stored_weight(slot).shape):
            raise ValueError(
                f"The mask of {name} has shape {tuple(masks[name].shape)}; the weight has {tuple(shape)}."
            )


def freeze(slots: Mapping[str, Slot], masks: Mapping[str, Tensor]) -> None:
    """Dense to frozen: write the zeros into the weights and keep each mask as buffer `<name>_mask`."""
    for name, slot in slots.items():
        weight = stored_weight(slot)
        slot.module.register_buffer(slot.tensor_name + MASK_SUFFIX, masks[name].to(weight.device))
    zero_masked_weights(slots)


def change_frozen_masks(slots: Mapping[str, Slot], masks: Mapping[str, Tensor]) -> int:
    """Replace frozen masks in place, write the zeros, and return how many entries changed.

    A weight that comes back starts at zero, unless its zero was not written yet.
    """
    flips = _overwrite(frozen_masks(slots), masks)
    zero_masked_weights(slots)
    return flips


def unfreeze(slots: Mapping[str, Slot]) -> None:
    """Frozen to dense: drop the masks, of gradients as well; the zeros stay in the weights."""
    for slot in slots.values():
        delattr(slot.module, slot.tensor_name + MASK_SUFFIX)
        stored_weight(slot)._backward_hooks = None


def frozen_masks(slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """The mask buffers by weight name; frozen state only."""
    return {name: slot.module.get_buffer(slot.tensor_name + MASK_SUFFIX) for name, slot in slots.items()}


@torch.no_grad()
def zero_masked_weights(slots: Mapping[str, Slot]) -> None:
    """Write exact zeros wherever a frozen mask is False."""
    for name, mask in frozen_masks(slots).items():
        write_zeros(sharding.local(stored_weight(slots[name])), sharding.local(mask))


def mask_gradients(slots: Mapping[str, Slot]) -> None:
    """Hook the weights so that pruned entries get no gradient.

    An optimizer made afterwards then holds no momentum or second moment for them and weight decay keeps 0 at 0, so
    they stay exactly zero in any training loop.
    """
    for slot in slots.values():
        weight, mask = stored_weight(slot), _GradientMask(slot)
        trainable = weight.requires_grad
        # torch only takes hooks on tensors that require a gradient; this one may be made trainable later.
        weight.requires_grad_(True)
        if sharding.is_sharded([weight]):
            # FSDP2 writes the gradient of a shard itself and then calls these hooks alone.
            weight.register_post_accumulate_grad_hook(mask.fill)
        else:
            weight.register_hook(mask)
        weight.requires_grad_(trainable)


class _GradientMask:
    def __init__(self, slot: Slot):
        self.slot = slot

    def __call__(self, grad: Tensor) -> Tensor:
        """The gradient with zeros where the mask is False."""
        return masked(grad, self._mask)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Write the zeros into the gradient of a sharded weight."""
        if weight.grad is not None:
            write_zeros(sharding.local(weight.grad), sharding.local(self._mask))

    @property
    def _mask(self) -> Tensor:
        return self.slot.module.get_buffer(self.slot.tensor_name + MASK_SUFFIX)


# Sharded weights -----------------------------------------------------------------------------------------------------


def shard_masks(slots: Mapping[str, Slot], state: str) -> None:
    """Split the masks as `fully_shard` has split the weights; in the frozen state, mask the gradients of the parts.

    Args:
        state: `"search"` or `"frozen"`.
    """
    for slot in slots.values():
        weight = stored_weight(slot)
        if state == "search":
            masked = cast(MaskedWeight, _parametrizations(slot)[0])
            masked.mask = sharding.split_like(masked.mask, weight)
        else:
            name = slot.tensor_name + MASK_SUFFIX
            setattr(slot.module, name, sharding.split_like(slot.module.get_buffer(name), weight))
    if state == "frozen":
        mask_gradients(slots)
