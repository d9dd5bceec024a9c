"""Convert images of any stored format to RGB, or raise one error with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

LONGEST_TO_SHORTEST = 200
"""Largest aspect ratio that is accepted: processors that keep the ratio would enlarge longer images enormously."""


class CorruptImageError(ValueError):
    """Report an image that cannot be decoded or converted to RGB: which one, and why."""


@dataclass
class RGBImage(Image):
    """Decode images as `usable_rgb` does, rotated by their EXIF orientation: a `datasets.Image`.

    Args:
        mode: `"RGB"`; saved data sets hold a plain `Image(mode="RGB")`, which loads without this package.
        decode: decoded images instead of `{"bytes": ..., "path": ...}`.

    Raises:
        CorruptImageError: an image is read that cannot be decoded.
    """

    _stored: ClassVar[Image] = Image()

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> PILImage.Image:
        """Decode one stored image."""
        try:
            return usable_rgb(self._stored.decode_example(value, token_per_repo_id=token_per_repo_id))
        except (MemoryError, ConnectionError):
            raise
        except UnidentifiedImageError as error:
            raise CorruptImageError(f"{_source(value)}: no image that Pillow can read") from error
        except Exception as error:  # Pillow's decoders raise almost anything on broken files.
            raise CorruptImageError(f"{_source(value)}: {str(error) or type(error).__name__}") from error


RGB_IMAGE = RGBImage(mode="RGB")


def _source(value: Any) -> str:
    if isinstance(value, dict) and value.get("path"):
        return str(value["path"])
    size = len(value["bytes"]) if isinstance(value, dict) and value.get("bytes") is not None else 0
    return f"{size} bytes without a file name"


def usable_rgb(image: PILImage.Image | None) -> PILImage.Image:
    """Convert an image to RGB, unless it would lose grey levels.

    Args:
        image: image of any mode of Pillow.

    Raises:
        CorruptImageError: there is no image, its pixels do not fit 8 bits, or its aspect ratio is too large.
    """
    if image is None:
        raise CorruptImageError("there is no image in this row")
    if max(image.size) > LONGEST_TO_SHORTEST * max(1, min(image.size)):
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels: one side is more than {LONGEST_TO_SHORTEST} times the other"
        )
    if image.mode.startswith("I") or image.mode == "F":
        _require_8_bits(image)
    return to_rgb(image)


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert to RGB as transformers' pipelines do: drop alpha without blending, keep an animation's first frame.

    Numbers above 255 become white; `usable_rgb` refuses images that have any.
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def _require_8_bits(image: PILImage.Image) -> None:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255) or (image.mode == "F" and high <= 1):
        bits = 16 if image.mode.startswith("I;16") else 32
        raise CorruptImageError(
            f"its pixels are {bits}-bit numbers from {low:g} to {high:g}, and image-classification pipelines show all "
            "numbers above 255 as white: store it with 8 bits per channel, its own black as 0 and its white as 255"
        )
