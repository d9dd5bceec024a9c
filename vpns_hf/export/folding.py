"""Fold a visual prompt into position embeddings or the image processor."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel

from ..model.configuration import PromptedSparseConfig
from ..model.prompts import VisualPrompt

# Largest difference of pixels in [0, 1] between two image processors that resize alike but round differently.
PIXEL_TOLERANCE = 0.03


class Placement(VisualPrompt):
    """Placement of an image under a prompt, without the prompt: shrunk and centred on black."""

    def __init__(self, config: PromptedSparseConfig, prompt: VisualPrompt):
        super().__init__(config)
        self.inner_size = prompt.inner_size

    def delta(self) -> Tensor:
        """Return zeros, [channels, height, width]."""
        return torch.zeros(len(self.mean), *self.image_size)


def fold_prompt(plain: PreTrainedModel, prompt: VisualPrompt) -> None:
    """Fold a prompt into the position embeddings by adding its patch embeddings to them.

    The patch embedding is linear in the pixels. Beside the image, on black, the prompt is a constant even after it is
    clamped; where it overlaps the image it is not.
    """
    delta = prompt.delta().float()
    image_area = prompt.place(torch.ones(1, 1, *prompt.image_size))[0] > 0
    if (delta * image_area).any():
        raise ValueError(
            "This prompt overlaps the image, so its effect changes with the image, and no stock model can hold it: "
            "export to ONNX, which builds the prompt in, or without the prompt by `use_prompt=False`."
        )
    projections = [part for part in plain.modules() if isinstance(part, nn.Conv2d) and part.in_channels == len(delta)]
    positions = [p for name, p in plain.named_parameters() if name.endswith(("position_embeddings", "pos_embed"))]
    if len(projections) != 1 or len(positions) != 1:
        raise ValueError(
            f"{type(plain).__name__} does not add position embeddings to patches as a ViT does, so the prompt cannot "
            "be folded into them: export to ONNX, which builds the prompt in, or without the prompt by "
            "`use_prompt=False`."
        )
    (projection,), (position,) = projections, positions
    normalised = delta.clamp(0, 1) / torch.tensor(prompt.std).view(-1, 1, 1)
    patches = F.conv2d(normalised[None], projection.weight, stride=projection.stride).flatten(2).transpose(1, 2)
    # Tokens that are no patches come first.
    position[:, position.shape[1] - patches.shape[1] :] += patches


def placing_processor(image_processor: BaseImageProcessor, placement: Placement) -> BaseImageProcessor:
    """Extend an image processor to shrink images and centre them on black.

    Cropping to more than the size of the image pads with black.
    """
    (height, width), (inner_height, inner_width) = placement.image_size, placement.inner_size
    changes = {
        "size": {"height": inner_height, "width": inner_width},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    placing = type(image_processor).from_dict(image_processor.to_dict() | changes)
    picture = sample_picture(placement.image_size)
    expected = placement(image_processor(picture, return_tensors="pt")["pixel_values"])
    if pixel_difference(placing(picture, return_tensors="pt")["pixel_values"], expected) > PIXEL_TOLERANCE:
        raise ValueError(
            f"This {type(image_processor).__name__} does more than to resize, so it cannot also shrink images for the "
            "prompt: export to ONNX, which does that itself, or without an image processor, and give the model images "
            "that are shrunk and centred on black."
        )
    return placing


def sample_picture(image_size: tuple[int, int]) -> PILImage.Image:
    """Return a smooth picture with other proportions than the image size."""
    height, width = 2 * image_size[0] + 1, 3 * image_size[1] + 1
    down, right = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    return PILImage.fromarray(np.stack(np.broadcast_arrays(down, right, 255 - right), axis=2).astype(np.uint8))


def pixel_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two pictures; infinite if their shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    # Normalised by one and the same mean and std, values span a range that stands for all of [0, 1].
    return float((found - expected).abs().max() / (expected.max() - expected.min()))
