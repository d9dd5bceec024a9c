"""Images as RGB, whatever they were stored as, or one error that says what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

LONGEST_TO_SHORTEST = 200
"""An image whose sides differ by a larger factor is refused: processors that keep the ratio would blow it up."""
SIXTEEN_BIT = ("PNG", "PPM")
"""Formats whose images of Pillow's mode I hold 16-bit numbers; those of others may go up to anything."""


class CorruptImageError(ValueError):
    """An image that cannot be decoded or shown as RGB; the message says which one and why."""


@dataclass
class RGBImage(Image):
    """`datasets.Image` whose images come out as `to_rgb` makes them, rotated as their EXIF data says.

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
            return to_rgb(self._stored.decode_example(value, token_per_repo_id=token_per_repo_id))
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


def to_rgb(image: PILImage.Image | None) -> PILImage.Image:
    """The image in mode RGB with 8 bits a channel; of an animation, the first frame.

    16-bit grey keeps its upper 8 bits, as Pillow does with 16-bit colour (its own conversion cuts everything above 255
    off). Alpha is dropped without blending, as image-classification pipelines do.

    Args:
        image: in any mode that Pillow knows.

    Raises:
        CorruptImageError: there is no image, its pixels have no defined white, or it is thinner than processors take.
    """
    if image is None:
        raise CorruptImageError("there is no image in this row")
    if max(image.size) > LONGEST_TO_SHORTEST * max(1, min(image.size)):
        raise CorruptImageError(
            f"{image.width} x {image.height} pixels: one side is more than {LONGEST_TO_SHORTEST} times the other"
        )
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT):
        return PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        _require_8_bits(image)
    return image.convert("RGB")


def _require_8_bits(image: PILImage.Image) -> None:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255) or (image.mode == "F" and high <= 1):
        raise CorruptImageError(
            f"its pixels are 32-bit numbers from {low:g} to {high:g}, of which white is not known: store it with 8 "
            "or 16 bits a channel, from 0 to 255 or 65535"
        )
