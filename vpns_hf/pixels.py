"""Measure the pixel values that an image processor makes, independent of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image as PILImage

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

TOLERANCE = 0.004
"""Largest difference of two shares of white that counts as equal: one of 255 grey levels."""
_COLOURS = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 20)])


@dataclass(frozen=True)
class PixelMap:
    """Describe the values that an image processor makes of RGB in [0, 1]: `(rgb[order] - mean) / std`.

    Args:
        mean: mean of each output channel, for images in [0, 1].
        std: standard deviation of each output channel, for images in [0, 1].
        order: input channel of each output channel, (0, 1, 2) for RGB and (2, 1, 0) for BGR.
        size: height and width of the output for an image of the size asked for.
        padding: left, top, right and bottom border of such an output.
        border: value of each output channel in such a border.
        letterboxes: border around images of another aspect ratio only.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]
    size: tuple[int, int]
    padding: tuple[int, int, int, int]
    border: tuple[float, ...]
    letterboxes: bool

    def agrees(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Compare the values of black and white with those of `(rgb - mean) / std`, within a grey level."""
        if not len(mean) == len(std) == len(self.mean):
            return False
        (m, s), (own_mean, own_std) = np.array([mean, std], float), np.array([self.mean, self.std])
        return all(np.all(np.abs((value - m) / s * own_std + own_mean - value) < TOLERANCE) for value in (0.0, 1.0))


def measure_pixels(processor: BaseImageProcessor, image_size: Sequence[int]) -> PixelMap:
    """Run an image processor on plain images and read its pixel map off the results.

    Settings do not say it: some processors flip channels (MobileViT), rescale otherwise than by 1/255, do not
    normalise, normalise twice (EfficientNet's `include_top`) or pad (Donut).

    Args:
        processor: image processor of any backend.
        image_size: height and width in pixels that it makes.

    Returns:
        The map, with the processor's own `image_mean` and `image_std` where they agree with it.

    Raises:
        ValueError: the processor makes no `pixel_values` of three channels, or they do not follow from each pixel
            by a scale and an offset per channel.
    """
    height, width = image_size
    name = type(processor).__name__
    plain = _outputs(processor, _COLOURS, height, width)
    # The centre is image even where the borders are padding.
    centres = plain[..., plain.shape[-2] // 2, plain.shape[-1] // 2].double().numpy()
    black, white = centres[0], centres[1]
    order = np.abs(centres[2:5] - black).argmax(axis=0)
    if sorted(order) != [0, 1, 2] or np.any(white <= black):
        raise ValueError(f"{name} does not keep the colour channels apart: use an image processor that does.")
    std = 1 / (white - black)
    mean = -black * std
    expected = (_COLOURS[:, order] / 255 - mean) / std
    if np.any(np.abs((centres - expected) * std) > TOLERANCE):
        raise ValueError(f"{name} does not scale pixels by one factor per channel: use an image processor that does.")
    is_border = _is_border(plain[-1], std)
    found = PixelMap(
        mean=tuple(map(_short, mean)),
        std=tuple(map(_short, std)),
        order=tuple(map(int, order)),
        size=(plain.shape[-2], plain.shape[-1]),
        padding=_padding(is_border),
        border=tuple(map(float, plain[-1, :, 0, 0])),
        letterboxes=not is_border.any()
        and any(
            bool(_is_border(_outputs(processor, _COLOURS[-1:], *other)[0], std).any())
            for other in ((height, width + width // 2), (height + height // 2, width))
        ),
    )
    settings = processor.to_dict()
    stated = settings.get("image_mean"), settings.get("image_std")
    if all(isinstance(each, Sequence) for each in stated) and found.agrees(*stated):
        return replace(found, mean=tuple(stated[0]), std=tuple(stated[1]))
    return found


def _outputs(processor: BaseImageProcessor, colours: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Process plain images, one per colour: float [colours, 3, height, width]."""
    images = [PILImage.new("RGB", (width, height), tuple(map(int, colour))) for colour in colours]
    try:
        values = processor(images=images, return_tensors="pt").get("pixel_values")
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{type(processor).__name__} cannot process a plain RGB image: {error}") from error
    if values is None or values.ndim != 4 or values.shape[1] != 3:
        shape = None if values is None else tuple(values.shape[1:])
        raise ValueError(
            f"{type(processor).__name__} makes pixel_values of shape {shape} of an RGB image: expected (3, height, "
            "width), use an image processor for colour images."
        )
    return values


def _is_border(image: torch.Tensor, std: np.ndarray) -> torch.Tensor:
    """Find the pixels of a processed plain image that do not have its colour: bool [height, width]."""
    centre = image[:, image.shape[1] // 2, image.shape[2] // 2]
    difference = (image - centre[:, None, None]).abs() * torch.tensor(std, dtype=image.dtype)[:, None, None]
    return (difference > TOLERANCE).any(dim=0)


def _padding(is_border: torch.Tensor) -> tuple[int, int, int, int]:
    """Measure the border on the left, top, right and bottom."""
    rows, columns = ((~is_border).any(dim).nonzero().flatten() for dim in (1, 0))
    height, width = is_border.shape
    return int(columns[0]), int(rows[0]), width - 1 - int(columns[-1]), height - 1 - int(rows[-1])


def _short(value: float) -> float:
    """Drop the digits beyond float32; no negative zero."""
    return float(f"{value:.6g}") + 0.0
