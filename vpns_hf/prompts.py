"""Visual prompts in input space.

A prompt lives in pixel space: [0, 1], before normalisation. A normalised image is denormalised, placed (as it is, or
shrunk and centred on black), the prompt is added, the sum is clamped to [0, 1] and normalised again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import PromptedSparseConfig


class _ClampPixels(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient passes wherever the input lies within [0, 1], the bounds included.

    torch changed the gradient of its own `clamp` at the bounds between 2.13 and 2.15. A prompt that starts at zero on
    black or white pixels sits exactly there and would never move.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        ctx.save_for_backward(pixels)
        return pixels.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (pixels,) = ctx.saved_tensors
        return torch.where((pixels >= 0) & (pixels <= 1), grad, 0)


class VisualPrompt(nn.Module):
    """Base of all prompts: placing, adding, clamping. A subclass brings its parameters and `delta`.

    Args:
        config: holds `image_size`, `image_mean`, `image_std`, `prompt_size` and `prompt_inner_size`.

    Raises:
        ValueError: a value that the prompt needs is missing or does not fit the image.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__()
        self.image_size, self.mean, self.std = config.geometry
        self.inner_size = tuple(config.prompt_inner_size or self.image_size)
        self.prompt_size = config.prompt_size
        if not 0 < 2 * self.prompt_size < min(self.image_size):
            raise ValueError(
                f"`prompt_size` is {self.prompt_size}; expected at least 1 and less than half of the image's shorter "
                f"side ({min(self.image_size)} pixels)."
            )
        if any(inner > outer or inner < 1 for inner, outer in zip(self.inner_size, self.image_size, strict=True)):
            raise ValueError(
                f"`prompt_inner_size` is {self.inner_size}; expected (height, width) of at most {self.image_size}."
            )

    def delta(self) -> Tensor:
        """What is added to the image: [channels, height, width], zero where the prompt leaves the image alone."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set the parameters to the initial values of the paper that brought this prompt."""
        raise NotImplementedError

    def place(self, pixels: Tensor) -> Tensor:
        """Shrink [n, c, h, w] pixels to `inner_size` and centre them on black, unless that is the full size."""
        if self.inner_size == self.image_size:
            return pixels
        pixels = F.interpolate(pixels, size=self.inner_size, mode="bilinear", antialias=True, align_corners=False)
        (height, width), (inner_height, inner_width) = self.image_size, self.inner_size
        top, left = (height - inner_height) // 2, (width - inner_width) // 2
        return F.pad(pixels, (left, width - inner_width - left, top, height - inner_height - top))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Prompted images.

        Args:
            pixel_values: normalised images, [n, channels, height, width].

        Returns:
            Normalised prompted images of the same shape and dtype; computed in float32.

        Raises:
            ValueError: the images do not have the configured size.
        """
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The prompt was made for images of {self.image_size} (height, width); got "
                f"{tuple(pixel_values.shape[-2:])}."
            )
        mean, std = (torch.tensor(v, device=pixel_values.device).view(-1, 1, 1) for v in (self.mean, self.std))
        # Denormalising leaves black at about -1e-9, outside the bounds that the clamp's gradient respects.
        pixels = (pixel_values.float() * std + mean).clamp(0, 1)
        prompted = _ClampPixels.apply(self.place(pixels) + self.delta().float())
        return ((prompted - mean) / std).to(pixel_values.dtype)


class PadPrompt(VisualPrompt):
    """A trainable frame of `prompt_size` pixels around the image, zero at the start (VPNs, arXiv 2312.01397).

    Holds its four strips only: with p = `prompt_size`, `channels * (2 * p * w + 2 * p * (h - 2 * p))` parameters,
    39,936 at 224 pixels and p = 16.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        (height, width), channels, size = self.image_size, len(self.mean), self.prompt_size
        self.top = nn.Parameter(torch.zeros(channels, size, width))
        self.bottom = nn.Parameter(torch.zeros(channels, size, width))
        self.left = nn.Parameter(torch.zeros(channels, height - 2 * size, size))
        self.right = nn.Parameter(torch.zeros(channels, height - 2 * size, size))

    def reset_parameters(self) -> None:
        """Zero: the first prompted image is the image itself."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def delta(self) -> Tensor:
        """The frame, zero inside: [channels, height, width]."""
        middle = F.pad(self.left, (0, self.image_size[1] - self.prompt_size)) + F.pad(
            self.right, (self.image_size[1] - self.prompt_size, 0)
        )
        return torch.cat([self.top, middle, self.bottom], dim=1)


PROMPTS: dict[str, type[VisualPrompt]] = {"pad": PadPrompt}


def build_prompt(config: PromptedSparseConfig) -> VisualPrompt | None:
    """The prompt that `config.prompt` names, or None.

    Raises:
        ValueError: an unknown name, or settings that do not fit the image.
    """
    if config.prompt is None:
        return None
    if config.prompt not in PROMPTS:
        raise ValueError(f"`prompt` is {config.prompt!r}; expected None or one of {', '.join(PROMPTS)}.")
    return PROMPTS[config.prompt](config)
