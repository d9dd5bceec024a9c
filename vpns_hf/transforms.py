"""Image transforms: the views of an image that a model is trained on and evaluated with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import BaseImageProcessor, TimmWrapperImageProcessor, ViTImageProcessor


@dataclass(frozen=True)
class ImageTransforms:
    """The two views of an image: augmented for training, and as the image processor makes it.

    Both methods take and return a batch, as `datasets` wants it: `dataset.with_transform(transforms.train)`.

    Args:
        image_processor: image processor of the backbone, of any backend.
        image_size: height and width of the images that the backbone takes.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
    """

    image_processor: BaseImageProcessor
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def train(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Augment as the paper does: resize to 9/8 of the size, crop at random, flip at random, normalise.

        Args:
            batch: `image`, a list of n PIL images, and `label`, if there are labels. The draws are torch's own.

        Returns:
            `pixel_values`, a float tensor [n, 3, height, width], and `labels`.
        """
        return _features(torch.stack([self._augment(image) for image in _rgb(batch["image"])]), batch)

    def eval(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Do exactly what the image processor does, as the image-classification pipeline would.

        Args:
            batch: `image`, a list of n PIL images, and `label`, if there are labels.

        Returns:
            `pixel_values`, a float tensor [n, 3, height, width], and `labels`.

        Raises:
            ValueError: if the image processor makes images of another size than `image_size`.
        """
        pixel_values = self.image_processor(images=_rgb(batch["image"]), return_tensors="pt")["pixel_values"]
        if tuple(pixel_values.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"The image processor makes images of {_size(pixel_values.shape[-2:])} pixels and the model takes "
                f"{_size(self.image_size)}: give the image processor the size of the model."
            )
        return _features(pixel_values, batch)

    @cached_property
    def _augment(self) -> v2.Compose:
        height, width = self.image_size
        return v2.Compose(
            [
                v2.Resize((height * 9 // 8, width * 9 // 8)),
                v2.RandomCrop((height, width)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(self.mean), list(self.std)),
            ]
        )


def matching_image_processor(
    processor: BaseImageProcessor | None, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> BaseImageProcessor:
    """The processor itself if it saves itself and gives images of this size; else a `ViTImageProcessor` that does.

    Args:
        processor: a backbone's image processor, or None. timm's is replaced, because it cannot be saved on its own.
        image_size: (height, width) in pixels.
        mean, std: normalisation, one value a channel.
    """
    if processor is not None and not isinstance(processor, TimmWrapperImageProcessor):
        sample = PILImage.new("RGB", (image_size[1] + 1, image_size[0] + 1))
        if tuple(processor(sample, return_tensors="pt")["pixel_values"].shape[-2:]) == tuple(image_size):
            return processor
    height, width = image_size
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=list(mean), image_std=list(std))


def _features(pixel_values: torch.Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {"pixel_values": pixel_values} | ({"labels": batch["label"]} if "label" in batch else {})


def _rgb(images: Sequence[PILImage.Image]) -> list[PILImage.Image]:
    return [image if image.mode == "RGB" else image.convert("RGB") for image in images]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
