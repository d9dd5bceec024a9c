"""Convert images to RGB, whatever they were stored as, or raise one error that says what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

LONGEST_TO_SHORTEST = 200
"""An image whose sides differ by a larger factor is refused: processors that keep the ratio would blow it up."""


class CorruptImageError(ValueError):
    """An image that cannot be decoded or shown as RGB; the message says which one and why."""


@dataclass
class RGBImage(Image):
    """`datasets.Image` whose images come out as `usable_rgb` makes them, rotated as their EXIF data says.

    Args:
        mode: `"RGB"`: saved data sets hold a plain `Image(mode="RGB")`, which can be read without this package.
        decode: whether images are decoded; without it, they come out as `{"bytes": ..., "path": ...}`.

    Raises:
        CorruptImageError: on reading an image that cannot be decoded.
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
    """Return `to_rgb` of an image that loses nothing by it.

    Args:
        image: in any mode that Pillow knows.

    Raises:
        CorruptImageError: if there is no image, its pixels do not fit 8 bits, or it is thinner than processors take.
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
    """Convert to RGB as transformers' pipelines do: alpha dropped without blending, of an animation the first frame.

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
