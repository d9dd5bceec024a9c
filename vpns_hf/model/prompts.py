"""Add visual prompts to images.

A prompt lives in pixel space: [0, 1], before normalisation. A normalised image is denormalised, placed (as it is, or
shrunk and centred on black), the prompt is added, the sum is clamped to [0, 1] and normalised again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..masking.precision import FixedPrecision

if TYPE_CHECKING:
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


class VisualPrompt(FixedPrecision):
    """Base of all prompts: placing, adding, clamping. A subclass brings its parameters and `delta`.

    Parameters stay float32 when the model is cast.

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
        if any(inner > outer or inner < 1 for inner, outer in zip(self.inner_size, self.image_size, strict=True)):
            raise ValueError(
                f"`prompt_inner_size` is {self.inner_size}; expected (height, width) of at most {self.image_size}."
            )

    def delta(self) -> Tensor:
        """Return the addend to the image, [channels, height, width]; zero where the image stays unchanged."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values, zero by default."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def require_size(self, largest: int) -> None:
        """Refuse a `prompt_size` that is not within 1 and `largest`.

        Raises:
            ValueError: it is not.
        """
        if not 1 <= self.prompt_size <= largest:
            raise ValueError(
                f"`prompt_size` is {self.prompt_size}; {type(self).__name__} takes 1 to {largest} on images of "
                f"{self.image_size} (height, width)."
            )

    def place(self, pixels: Tensor) -> Tensor:
        """Shrink [n, c, h, w] pixels to `inner_size` and centre them on black, unless that is the full size."""
        if self.inner_size == self.image_size:
            return pixels
        pixels = F.interpolate(pixels, size=self.inner_size, mode="bilinear", antialias=True, align_corners=False)
        top, bottom, left, right = _margins(self.image_size, self.inner_size)
        return F.pad(pixels, (left, right, top, bottom))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Add the prompt to images.

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


def _margins(outer: tuple[int, ...], inner: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Compute the margins above, below, left and right of an `inner` (height, width) centred in an `outer` one."""
    (height, width), (inner_height, inner_width) = outer, inner
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return top, height - inner_height - top, left, width - inner_width - left


class PadPrompt(VisualPrompt):
    """A trainable frame of `prompt_size` pixels around the image, zero at the start (VPNs, arXiv 2312.01397).

    Holds its four strips only: with p = `prompt_size`, `channels * (2 * p * w + 2 * p * (h - 2 * p))` parameters,
    39,936 at 224 pixels and p = 16.

    Raises:
        ValueError: `prompt_size` is not at least 1 and less than half of the image's shorter side.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        self.require_size(_widest_frame(self.image_size))
        (height, width), channels, size = self.image_size, len(self.mean), self.prompt_size
        self.top = nn.Parameter(torch.zeros(channels, size, width))
        self.bottom = nn.Parameter(torch.zeros(channels, size, width))
        self.left = nn.Parameter(torch.zeros(channels, height - 2 * size, size))
        self.right = nn.Parameter(torch.zeros(channels, height - 2 * size, size))

    def delta(self) -> Tensor:
        """Return the frame, zero inside: [channels, height, width]."""
        return _frame(self.top, self.bottom, self.left, self.right)


def _widest_frame(image_size: tuple[int, int]) -> int:
    return (min(image_size) - 1) // 2


def _frame(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    width = top.shape[2]
    middle = F.pad(left, (0, width - left.shape[2])) + F.pad(right, (width - right.shape[2], 0))
    return torch.cat([top, middle, bottom], dim=1)


class ExpandPrompt(VisualPrompt):
    """The image, shrunk and centred, in a trainable border of colours (ILM-VP, arXiv 2211.11635).

    The image shrinks to `prompt_inner_size`, or else by `prompt_size` pixels on each side. The border is the sigmoid
    of its parameters, which start at zero (mid-grey), so it stays within [0, 1] and the clamp never takes its
    gradient. It has `channels * (h * w - inner_h * inner_w)` parameters, 39,936 at 224 pixels and p = 16.

    Raises:
        ValueError: the image would vanish, or no border would be left on some side.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        (height, width), channels = self.image_size, len(self.mean)
        if config.prompt_inner_size is None:
            self.require_size(_widest_frame(self.image_size))
            self.inner_size = (height - 2 * self.prompt_size, width - 2 * self.prompt_size)
        top, bottom, left, right = _margins(self.image_size, self.inner_size)
        if not (top and left):
            raise ValueError(
                f"`prompt_inner_size` is {self.inner_size}; the expand prompt needs a border on every side, so at "
                f"most {(height - 2, width - 2)} (height, width)."
            )
        inner_height = self.inner_size[0]
        self.top = nn.Parameter(torch.zeros(channels, top, width))
        self.bottom = nn.Parameter(torch.zeros(channels, bottom, width))
        self.left = nn.Parameter(torch.zeros(channels, inner_height, left))
        self.right = nn.Parameter(torch.zeros(channels, inner_height, right))

    def delta(self) -> Tensor:
        """Return the border, zero inside: [channels, height, width]."""
        return _frame(self.top.sigmoid(), self.bottom.sigmoid(), self.left.sigmoid(), self.right.sigmoid())


class FixedPrompt(VisualPrompt):
    """A trainable square patch of side `prompt_size` at the top left (VPNs, arXiv 2312.01397).

    What is added is the sigmoid of the parameters, which start at zero: the patch first brightens the image by half of
    the range and can only ever brighten it. Pixels that this pushes above white have no gradient. It has
    `channels * prompt_size ** 2` parameters; at 224 pixels a side of 115 gives 39,675, about a frame of 16.

    Raises:
        ValueError: `prompt_size` is not within 1 and the image's shorter side.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        self.require_size(min(self.image_size))
        self.patch = nn.Parameter(torch.zeros(len(self.mean), self.prompt_size, self.prompt_size))

    def delta(self) -> Tensor:
        """Return the patch, zero elsewhere: [channels, height, width]."""
        height, width = self.image_size
        return F.pad(self.patch.sigmoid(), (0, width - self.prompt_size, 0, height - self.prompt_size))


class RandomPrompt(VisualPrompt):
    """A square window of side `prompt_size`, at random, of a trainable image (VPNs, arXiv 2312.01397).

    What is added is the sigmoid of the parameters within the window, with the limits of [`FixedPrompt`]. In training
    mode every call draws a new place, the same for the whole batch, from torch's global CPU generator, whose state
    `Trainer` saves. In evaluation mode the window is in the middle. It has `channels * h * w` parameters.

    Raises:
        ValueError: `prompt_size` is not within 1 and the image's shorter side.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        self.require_size(min(self.image_size))
        self.program = nn.Parameter(torch.zeros(len(self.mean), *self.image_size))

    def delta(self) -> Tensor:
        """Return the window, zero elsewhere: [channels, height, width]; drawn at each call in training mode."""
        size, (height, width) = self.prompt_size, self.image_size
        top, left = self._offset(height), self._offset(width)
        window = self.program[:, top : top + size, left : left + size].sigmoid()
        return F.pad(window, (left, width - size - left, top, height - size - top))

    def _offset(self, side: int) -> int:
        last = side - self.prompt_size
        return int(torch.randint(last + 1, ())) if self.training else last // 2


class StripePrompt(VisualPrompt):
    """Evenly spaced trainable horizontal bands across the image, zero at the start.

    No official code for such a prompt is known; the layout is ours. The bands have as many pixels as the frame of
    [`PadPrompt`] with the same `prompt_size`, as nearly as whole rows allow without exceeding it: with p =
    `prompt_size`, `rows = (2 * p * w + 2 * p * (h - 2 * p)) // w`. They are split into the fewest bands of at most p
    rows, with equal gaps above, between and below, all as nearly as whole rows allow. `channels * rows * w`
    parameters: 59 rows in four bands, 39,648 parameters, at 224 pixels and p = 16.

    Raises:
        ValueError: `prompt_size` is not at least 1 and less than half of the image's shorter side.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        self.require_size(_widest_frame(self.image_size))
        (height, width), size = self.image_size, self.prompt_size
        count = (2 * size * width + 2 * size * (height - 2 * size)) // width
        self.rows = _striped_rows(height, count, bands=math.ceil(count / size))
        self.stripes = nn.Parameter(torch.zeros(len(self.mean), count, width))

    def delta(self) -> Tensor:
        """Return the bands, zero between them: [channels, height, width]."""
        rows = torch.tensor(self.rows, device=self.stripes.device)
        empty = self.stripes.new_zeros(len(self.mean), *self.image_size)
        return empty.index_copy(1, rows, self.stripes)


def _striped_rows(height: int, count: int, bands: int) -> list[int]:
    """List the `count` rows of `height` that the bands cover, in ascending order."""
    band_ends = [count * band // bands for band in range(bands + 1)]
    gap_ends = [(height - count) * gap // (bands + 1) for gap in range(1, bands + 2)]
    return [gap_ends[band] + row for band in range(bands) for row in range(band_ends[band], band_ends[band + 1])]


class LowRankPrompt(VisualPrompt):
    """A trainable image of rank `prompt_size` in each channel, added to the whole image (LoR-VP, arXiv 2502.00896).

    The product of a left factor [channels, height, rank], zero at the start, and a right factor
    [channels, rank, width], drawn from a normal distribution of standard deviation 0.01 as in the paper's code, whose
    rank is 4. Zero at the start, `channels * rank * (h + w)` parameters: 5,376 at 224 pixels and rank 4. The paper
    does not bound the sum; here it is clamped to what an image can show, as for every prompt.

    Raises:
        ValueError: `prompt_size` is not within 1 and the image's shorter side.
    """

    def __init__(self, config: PromptedSparseConfig):
        super().__init__(config)
        self.require_size(min(self.image_size))
        (height, width), channels = self.image_size, len(self.mean)
        self.left = nn.Parameter(torch.zeros(channels, height, self.prompt_size))
        self.right = nn.Parameter(torch.zeros(channels, self.prompt_size, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the left factor to zero and draw the right one from torch's global generator."""
        nn.init.zeros_(self.left)
        nn.init.normal_(self.right, std=0.01)

    def delta(self) -> Tensor:
        """Return the product of the factors: [channels, height, width]."""
        # Autocast would round the product to half precision, in which small steps of the prompt vanish.
        with torch.autocast(self.left.device.type, enabled=False):
            return self.left @ self.right


PROMPTS: dict[str, type[VisualPrompt]] = {
    "pad": PadPrompt,
    "fixed": FixedPrompt,
    "random": RandomPrompt,
    "expand": ExpandPrompt,
    "stripe": StripePrompt,
    "lowrank": LowRankPrompt,
}


def build_prompt(config: PromptedSparseConfig) -> VisualPrompt | None:
    """Build the prompt that `config.prompt` names, or None.

    Raises:
        ValueError: an unknown name, or settings that do not fit the image.
    """
    if config.prompt is None:
        return None
    if config.prompt not in PROMPTS:
        raise ValueError(f"`prompt` is {config.prompt!r}; expected None or one of {', '.join(PROMPTS)}.")
    return PROMPTS[config.prompt](config)
