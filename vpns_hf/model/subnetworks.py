"""Compare the masks and take over the prompt of a shared subnetwork."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .modeling import PromptedSparseModel

PROMPT_FIELDS = ("prompt", "prompt_size", "prompt_inner_size", "image_size", "image_mean", "image_std", "use_prompt")


def fitting_masks(model: PromptedSparseModel, subnetwork: PromptedSparseModel, name: str) -> dict[str, Tensor]:
    """Return the masks of a subnetwork for the prunable weights of another model.

    Args:
        model: the model that the masks are for; a new head of it is left out.
        subnetwork: the model that holds the masks.
        name: Hub id or folder of the subnetwork, for the messages.

    Raises:
        ValueError: the subnetwork is not frozen, or its pattern or tensors differ from those of the model.
    """
    if subnetwork.config.state != "frozen":
        raise ValueError(
            f"{name} is in the {subnetwork.config.state!r} state, so it holds no fixed masks; save it after "
            "`freeze_masks()`."
        )
    if subnetwork.config.pattern != model.config.pattern:
        raise ValueError(
            f"The masks of {name} have the pattern {subnetwork.config.pattern!r}, and this model was built for "
            f"{model.config.pattern!r}; build it with `from_backbone(..., pattern={subnetwork.config.pattern!r})`."
        )
    masks = subnetwork.masks()
    if model.config.new_head:
        masks = {weight: mask for weight, mask in masks.items() if weight not in model.config.head_parameters}
    if wrong := _differences(model.masks(), masks):
        raise ValueError(
            f"The subnetwork {name} does not fit this {type(model.backbone).__name__}:\n" + "\n".join(wrong)
        )
    return masks


def _differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """One line for every tensor that two models do not share."""
    missing = [f"{name}: not in the subnetwork" for name in own if name not in other]
    surplus = [f"{name}: not in this model" for name in other if name not in own]
    shapes = [
        f"{name}: {tuple(other[name].shape)} in the subnetwork, {tuple(mask.shape)} here"
        for name, mask in own.items()
        if name in other and other[name].shape != mask.shape
    ]
    return missing + surplus + shapes


def take_prompt(model: PromptedSparseModel, other: PromptedSparseModel, name: str, remedy: str) -> None:
    """Replace the prompt of a model by that of another one, with the settings that belong to it.

    Args:
        model: the model that gets the prompt.
        other: the model that has it.
        name: Hub id or folder of the other model, for the message.
        remedy: advice that ends the message.

    Raises:
        ValueError: the other prompt is made for images of another size or normalisation.
    """
    assert other.prompt is not None
    if model.config.image_size is not None and other.config.geometry != model.config.geometry:
        raise ValueError(
            f"The prompt of {name} is made for {other.config.geometry}, and this model takes "
            f"{model.config.geometry}; {remedy}."
        )
    model.prompt = other.prompt.to(model.device)
    for field in PROMPT_FIELDS:
        setattr(model.config, field, getattr(other.config, field))
