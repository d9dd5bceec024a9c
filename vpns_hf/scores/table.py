"""Score weights on a few batches, to select a mask without learning it; larger = keep.

A new score is one function and one entry in [`SCORES`].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_outputs import ImageClassifierOutput

from .. import masking
from ..model.modeling import PromptedSparseModel
from ..values import ABOVE_0, SEED, Check, checked, instance_of, require
from .layer_inputs import input_columns, observe_inputs

_BATCHES = Check(
    "a list of dictionaries of `pixel_values` and maybe `labels`",
    lambda value: isinstance(value, Sequence) and all(isinstance(batch, Mapping) for batch in value),
)
Score = Callable[..., dict[str, Tensor]]


def score_weights(
    name: str,
    model: PromptedSparseModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    masks: Mapping[str, Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Score every prunable weight of the dense backbone, without changing the model or the global random state.

    The score is computed on a copy in float32 and in eval mode, without prompt. The loss is the model's own, under its
    head or label mapping. Weights that the loss does not reach score 0.

    Args:
        name: a key of [`SCORES`].
        model: model in any state. Its masks are ignored, but a frozen model keeps the zeros that they wrote.
        batches: dictionaries of `pixel_values` [n, channels, height, width], normalised, and, for scores that need
            them, `labels` [n]; other keys are ignored. Their losses are summed.
        masks: bool tensors by weight name, True = kept, one for each prunable weight. Masked weights are zero, get no
            gradient, and score 0; a caller that ranks scores of either sign must exclude them. None: all kept.
        loss: function of logits [n, num_labels] and labels that returns the loss of a batch; None: the model's own.
        options: options of the score, such as `seed` or `temperature`.

    Returns:
        One tensor per prunable weight, keyed and ordered as `model.masks()`, on the model's device; float32, or
        float64 for SynFlow.

    Raises:
        ValueError: unknown score, no batches or labels where they are needed, masks that do not fit the model, or
            scores that are not finite.
    """
    if not isinstance(name, str) or name not in SCORES:
        raise ValueError(f"There is no score {name!r}; expected one of {', '.join(SCORES)}.")
    require("model", model, instance_of(PromptedSparseModel))
    require("batches", batches, _BATCHES)
    dense = dense_copy(model, masks)
    dense.task_loss = loss
    with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
        scores = SCORES[name](dense, Batches(name, dense, batches), **options)
    scores = {weight: scores[weight].detach() for weight in dense.masks()}
    for weight, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"The {name!r} score of {weight} is not finite; check the weights and the images.")
    return {weight: torch.where(mask, scores[weight], 0) for weight, mask in dense.masks().items()}


def dense_copy(model: PromptedSparseModel, masks: Mapping[str, Tensor] | None = None) -> PromptedSparseModel:
    """Copy a model in float32 and eval mode, without scores; only prunable weights require gradients.

    Args:
        model: model in any state; not modified.
        masks: masks under which the copy is frozen; None: the copy is dense.

    Raises:
        ValueError: the names or shapes of the masks do not fit.
    """
    dense = copy.deepcopy(model)
    # Accelerate replaces the `forward` of a prepared model by one with autocast.
    dense.__dict__.pop("forward", None)
    if dense.config.state == "search":
        dense.detach_scores()
    elif dense.config.state == "frozen":
        masking.unfreeze(dense.prunables())
        dense.config.state = "dense"
    dense.float().eval()
    if dense.backbone.config._attn_implementation not in _PLAIN_ATTENTION:
        dense.backbone.set_attn_implementation("eager")
    if masks is not None:
        dense.apply_masks(masks)
    dense.requires_grad_(False)
    for weight in dense.prunable_weights().values():
        weight.requires_grad_(True)
    return dense


# Others, such as flash attention, support only half precision or no second derivative.
_PLAIN_ATTENTION = (None, "eager", "sdpa")


class Batches(Sequence[Mapping[str, Tensor]]):
    """Batches of images that move to the device of the model when they are read.

    Args:
        purpose: name of the score, for the error if there are no batches.
        model: model that determines the device and the dtype of images.
        batches: dictionaries with `pixel_values` and maybe `labels`.
    """

    def __init__(self, purpose: str, model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]):
        self.purpose, self.model, self.batches = purpose, model, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        if not self.batches:
            raise ValueError(f"{self.purpose!r} needs at least one batch of images, and none was given.")
        batch = self.batches[index]
        if not isinstance(batch.get("pixel_values"), Tensor):
            raise ValueError(f"{self.purpose!r} needs batches with `pixel_values`, and one has {sorted(batch)}.")
        moved = {"pixel_values": batch["pixel_values"].to(self.model.device, self.model.dtype)}
        return moved | ({"labels": batch["labels"].to(self.model.device)} if "labels" in batch else {})


def _classify(model: PromptedSparseModel, batch: Mapping[str, Tensor]) -> ImageClassifierOutput:
    if "labels" not in batch:
        raise ValueError("This score follows the loss, but a batch has no `labels`.")
    if model.config.label_mapping is not None and model.config.mapped_labels is None:
        raise ValueError("This score follows the loss, and the model still lacks its label mapping; set it first.")
    return model(batch["pixel_values"], batch["labels"], use_prompt=False)


def _gradients(total: Tensor, weights: Mapping[str, Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Compute gradients in the order of the weights, zero where a weight does not affect the total."""
    return torch.autograd.grad(total, tuple(weights.values()), create_graph=create_graph, materialize_grads=True)


def _summed_gradients(losses: Iterable[Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum the gradients of the losses, whose graphs are built one at a time."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for loss in losses:
        for total, gradient in zip(sums.values(), _gradients(loss, weights), strict=True):
            total += gradient
    return sums


def magnitude(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Score by magnitude, `|theta|`."""
    return {name: weight.detach().abs() for name, weight in model.prunable_weights().items()}


def group_magnitude(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Score by the squared weight over the mean square of its tensor.

    Summed over a group of weights, this is the squared norm of the group with every layer scaled to the same size, as
    DepGraph ranks channels (arXiv 2301.12900; its code scales by the mean norm of each group's channels instead).
    """
    squares = {name: weight.detach().float().square() for name, weight in model.prunable_weights().items()}
    tiny = torch.finfo(torch.float32).tiny
    return {name: square / square.mean().clamp_min(tiny) for name, square in squares.items()}


def lamp(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Score by the squared weight over the sum of all squares in its tensor that are not smaller (LAMP).

    arXiv 2010.07611. Within one tensor the ranking equals that of magnitude, ties included.
    """
    return {name: lamp_of(weight.detach()) for name, weight in model.prunable_weights().items()}


def lamp_of(weight: Tensor) -> Tensor:
    """Compute the LAMP scores of one weight tensor, in float32."""
    squares = weight.double().flatten().square()
    # Of equal weights the earlier one counts as larger, because selection keeps it first.
    ordered, order = squares.sort(descending=True, stable=True)
    ratios = ordered / ordered.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(squares).scatter_(0, order, ratios).view(weight.shape).float()


@checked(seed=SEED)
def random(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]], seed: int = 0) -> dict[str, Tensor]:
    """Draw scores uniformly from [0, 1), the same on every device.

    Args:
        model, batches: see [`score_weights`].
        seed: seed of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator).to(weight.device)
        for name, weight in model.prunable_weights().items()
    }


def snip(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Score by `|theta * dL/dtheta|`, the effect of each mask entry on the loss (SNIP, arXiv 1810.02340)."""
    return _connection_sensitivity(model.prunable_weights(), (_classify(model, batch).loss for batch in batches))


def _connection_sensitivity(weights: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Compute `|theta * gradient|` of the sum of the losses."""
    totals = _summed_gradients(losses, weights)
    return {name: (weight.detach() * totals[name]).abs() for name, weight in weights.items()}


def woodfisher(
    model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]], block: int = 32, damping: float = 1e-5
) -> dict[str, Tensor]:
    """Score by `weight^2 / (2 [F^-1]_ii)`, the rise of the loss when a weight goes and its neighbours make up for it.

    F is the empirical Fisher matrix of the gradients of single images, within blocks of neighbouring weights of a
    tensor (WoodFisher, arXiv 2004.14340). Weights are scored, not moved. Memory: `block` numbers a weight.

    Args:
        model, batches: see [`score_weights`].
        block: number of weights in a block.
        damping: addition to the diagonal, in units of the mean of all squared gradients.
    """
    weights, images = model.prunable_weights(), 0
    fishers = {
        name: weight.new_zeros(math.ceil(weight.numel() / block), block, block) for name, weight in weights.items()
    }
    for batch in batches:
        for index in range(len(batch["pixel_values"])):
            one = {key: value[index : index + 1] for key, value in batch.items()}
            for fisher, gradient in zip(
                fishers.values(), _gradients(_classify(model, one).loss, weights), strict=True
            ):
                parts = _in_blocks(gradient, block)
                fisher.baddbmm_(parts.unsqueeze(2), parts.unsqueeze(1))
            images += 1
    total = images * sum(weight.numel() for weight in weights.values())
    squares = torch.stack([fisher.diagonal(dim1=1, dim2=2).sum() for fisher in fishers.values()]).sum() / total
    return {
        name: _saliency(weight.detach(), fishers[name] / images, damping * squares) for name, weight in weights.items()
    }


def _in_blocks(tensor: Tensor, block: int) -> Tensor:
    """Arrange a tensor as [blocks, block], the last one filled with zeros."""
    return F.pad(tensor.flatten(), (0, -tensor.numel() % block)).view(-1, block)


def _saliency(weight: Tensor, fisher: Tensor, damping: Tensor) -> Tensor:
    """Compute the scores of one tensor from its blocks [blocks, block, block] of the Fisher matrix."""
    block = fisher.shape[-1]
    damped = fisher.double() + damping.double().clamp_min(1e-30) * torch.eye(block, device=fisher.device)
    inverse = torch.linalg.inv(damped).diagonal(dim1=1, dim2=2)
    scores = _in_blocks(weight, block).double().square() / (2 * inverse)
    return scores.flatten()[: weight.numel()].view(weight.shape).float()


@checked(temperature=ABOVE_0)
def grasp(
    model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]], temperature: float = 200.0
) -> dict[str, Tensor]:
    """Score by `theta * Hg`, the decrease of gradient flow if the weight is removed (GraSP, arXiv 2002.07376).

    Scores have either sign. H and g are Hessian and gradient of the loss summed over all batches.

    Args:
        model, batches: see [`score_weights`].
        temperature: divisor of the logits.
    """

    def losses() -> Iterable[Tensor]:
        for batch in batches:
            yield model.loss(_classify(model, batch).logits / temperature, batch["labels"])

    return _gradient_flow(model.prunable_weights(), losses)


def _gradient_flow(weights: Mapping[str, Tensor], losses: Callable[[], Iterable[Tensor]]) -> dict[str, Tensor]:
    """Compute `theta * Hg` of the sum of the losses, which are evaluated twice."""
    gradients = _summed_gradients(losses(), weights)

    def flow(loss: Tensor) -> Tensor:
        own = _gradients(loss, weights, create_graph=True)
        return torch.stack([(fixed * part).sum() for fixed, part in zip(gradients.values(), own, strict=True)]).sum()

    # The other kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        products = _summed_gradients(map(flow, losses()), weights)
    return {name: weight.detach() * products[name] for name, weight in weights.items()}


def synflow(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Score by `|theta * dR/dtheta|`, R the sum of the logits of a white image (SynFlow, arXiv 2006.05467).

    This is one evaluation; the paper's 100 rounds belong to the caller. The absolute value is taken of every
    parameter and buffer, those of normalisation layers included. The conservation laws of the paper hold for
    networks of ReLU without normalisation; for attention, GELU and normalisation the score is a heuristic.

    Args:
        model: see [`score_weights`].
        batches: batches of which the first determines the size of the image.
    """
    image = torch.ones_like(batches[0]["pixel_values"][:1], dtype=torch.float64)
    # A product over many layers exceeds the range of float32.
    model.double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    return _connection_sensitivity(model.prunable_weights(), [model(image, use_prompt=False).logits.sum()])


@torch.no_grad()
def wanda(model: PromptedSparseModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Score by magnitude times the norm of the weight's input over all batches (Wanda, arXiv 2306.11695).

    The paper ranks within output rows, the scope `"row"` of [`masking.select_masks`]. Needs no labels.

    Raises:
        ValueError: the inputs of a layer cannot be observed.
    """
    prunables, squares = model.prunables(), dict[str, Tensor]()

    def add(name: str, inputs: Tensor, outputs: Tensor) -> None:
        # Summing squares over images before unfolding needs the memory of one image only.
        squared = inputs.square().sum(0, keepdim=True, dtype=torch.float64)
        columns = input_columns(name, prunables[name].module, squared, outputs).sum(1)
        squares[name] = squares[name] + columns if name in squares else columns

    with observe_inputs(prunables, add):
        for batch in batches:
            model(batch["pixel_values"], use_prompt=False)
    return {name: _wanda(weight, squares[name]) for name, weight in model.prunable_weights().items()}


def _wanda(weight: Tensor, squares: Tensor) -> Tensor:
    """Multiply |weight| by the root of the sum of squares [groups, columns] of its inputs."""
    norms = squares.sqrt().unsqueeze(1)
    return (weight.abs().reshape(len(squares), -1, squares.shape[1]) * norms).reshape(weight.shape).float()


SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "group_magnitude": group_magnitude,
    "lamp": lamp,
    "random": random,
    "snip": snip,
    "woodfisher": woodfisher,
    "grasp": grasp,
    "synflow": synflow,
    "wanda": wanda,
}
"""Scores by name. A score takes the copy made by [`dense_copy`], the batches on its device and its own options; it may
modify the copy, and returns a tensor for each of `model.prunable_weights()`."""
