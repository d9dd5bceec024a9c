"""Transform images into the views that a model is trained on and evaluated with."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, Image
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import BaseImageProcessor, ViTImageProcessor

from ..pixels import PixelMap, measure_pixels
from .images import RGB_IMAGE, CorruptImageError, usable_rgb
from .splits import SplitView, StoredRows

AUGMENTATIONS: dict[str, Callable[[], list[Any]] | None] = {
    "paper": list,
    "randaugment": lambda: [v2.RandAugment()],
    "trivialaugment": lambda: [v2.TrivialAugmentWide()],
    "none": None,
}
"""Augmentations by name, applied after resizing to 9/8 of the size, random crop and random flip: none further in the
paper's own. `none` omits crop and flip as well: training images equal those of evaluation."""


@dataclass(frozen=True)
class ImageTransforms:
    """Transform an image into two views: augmented for training, and as the image processor makes it.

    Both methods map batches, for `dataset.with_transform(transforms.train)`. The training view follows the image
    processor's channel order, scale and border, which are measured on plain images when the transforms are built.

    Args:
        image_processor: image processor of the backbone, of any backend.
        image_size: height and width of the backbone's input.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel, for images in [0, 1].
        augmentation: key of `AUGMENTATIONS`.

    Raises:
        ValueError: there is no such augmentation, the model has other than three channels, or the image processor
            makes images of another size, normalisation or border than the training view.
    """

    image_processor: BaseImageProcessor
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    augmentation: str = "paper"

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation is '{self.augmentation}': expected one of {', '.join(AUGMENTATIONS)}.")
        if not len(self.mean) == len(self.std) == 3:
            raise ValueError(
                f"The model takes images of {len(self.mean)} channels, and image processors and pipelines make RGB: "
                "use a backbone with 3 channels, or transforms of your own for a data set of your own."
            )
        self._check_views()

    def _check_views(self) -> None:
        pixels, name = self._pixels, type(self.image_processor).__name__
        if pixels.size != tuple(self.image_size):
            raise ValueError(
                f"{name} makes images of {_size(pixels.size)} pixels and the model takes {_size(self.image_size)}: "
                "give the image processor the size of the model."
            )
        if not pixels.agrees(self.mean, self.std):
            raise ValueError(
                f"{name} normalises images with mean {list(pixels.mean)} and std {list(pixels.std)} in effect, and "
                f"the model expects mean {list(self.mean)} and std {list(self.std)}: build the model with the first "
                "two as image_mean and image_std, or choose an image processor with the last two."
            )
        if pixels.letterboxes and AUGMENTATIONS[self.augmentation] is not None:
            raise ValueError(
                f"{name} adds borders to images of another aspect ratio, which the training view stretches: choose "
                "augmentation 'none', or an image processor that resizes or crops."
            )

    @cached_property
    def _pixels(self) -> PixelMap:
        return measure_pixels(self.image_processor, self.image_size)

    def train(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Augment a batch as the paper does: resize to 9/8 of the size, crop and flip at random, normalise.

        Args:
            batch: `image`, a list of n PIL images, and optionally `label`. Random numbers are drawn from torch.

        Returns:
            `pixel_values`, a float tensor [n, 3, height, width], and `labels`.

        Raises:
            CorruptImageError: an image cannot be used.
        """
        if AUGMENTATIONS[self.augmentation] is None:
            return self.eval(batch)
        return _features(torch.stack([self._augment(usable_rgb(image)) for image in batch["image"]]), batch)

    def eval(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Process a batch exactly as the image-classification pipeline would.

        Args:
            batch: `image`, a list of n PIL images, and optionally `label`.

        Returns:
            `pixel_values`, a float tensor [n, 3, height, width], and `labels`.

        Raises:
            CorruptImageError: an image cannot be used.
            ValueError: the image processor makes images of another size than `image_size`.
        """
        return self._process(batch)

    def _process(self, batch: Mapping[str, Any], **switches: bool) -> dict[str, Any]:
        images = [usable_rgb(image) for image in batch["image"]]
        pixel_values = self.image_processor(images=images, return_tensors="pt", **switches)["pixel_values"]
        if tuple(pixel_values.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"The image processor makes images of {_size(pixel_values.shape[-2:])} pixels and the model takes "
                f"{_size(self.image_size)}: give the image processor the size of the model."
            )
        return _features(pixel_values, batch)

    @property
    def _train_size(self) -> tuple[int, int]:
        height, width = self._content_size
        return height * 9 // 8, width * 9 // 8

    @property
    def _content_size(self) -> tuple[int, int]:
        """Compute height and width of the image inside the processor's border."""
        (height, width), (left, top, right, bottom) = self.image_size, self._pixels.padding
        return height - top - bottom, width - left - right

    @cached_property
    def _augment(self) -> v2.Compose:
        further = AUGMENTATIONS[self.augmentation]
        pixels = self._pixels
        reordered = [v2.Lambda(partial(_reorder, order=pixels.order))] if pixels.order != (0, 1, 2) else []
        bordered = [v2.Pad(list(pixels.padding), fill=list(pixels.border))] if any(pixels.padding) else []
        return v2.Compose(
            [
                v2.Resize(self._train_size),
                v2.RandomCrop(self._content_size),
                v2.RandomHorizontalFlip(),
                *(further() if further else ()),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                *reordered,
                v2.Normalize(list(self.mean), list(self.std)),
                *bordered,
            ]
        )

    def cached_train_view(self, split: Dataset, rows: StoredRows, num_proc: int | None = None) -> SplitView:
        """Build the view of `train`, bit for bit, from cached copies at 9/8 of the size.

        `datasets` resizes once and caches the copies uncompressed: about 190 kB each for a size of 224. Another size
        or version of Pillow makes other copies.

        Args:
            split: split of `load_transfer_dataset`.
            rows: stored rows of its images.
            num_proc: number of processes that resize.

        Returns:
            The view, for a trainer.
        """
        if AUGMENTATIONS[self.augmentation] is None:
            return self.cached_eval_view(split, rows, num_proc)
        copies = _resized_copies(split, rows, num_proc, _resized_for_training, size=self._train_size)
        return SplitView(copies.with_transform(self.train), rows)

    def cached_eval_view(self, split: Dataset, rows: StoredRows, num_proc: int | None = None) -> SplitView:
        """Build the view of `eval`, bit for bit, from cached copies that the image processor has resized and cropped.

        Args:
            split: split of `load_transfer_dataset`.
            rows: stored rows of its images.
            num_proc: number of processes that resize.

        Returns:
            The view, for a trainer.

        Raises:
            ValueError: the image processor cannot resize and normalise in two steps.
        """
        self._check_two_steps()
        copies = _resized_copies(split, rows, num_proc, _resized_for_eval, processor=self.image_processor)
        return SplitView(copies.with_transform(self._eval_resized), rows)

    def _eval_resized(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return self._process(batch, do_resize=False, do_center_crop=False)

    def _check_two_steps(self) -> None:
        if not self._is_two_steps():
            raise ValueError(
                f"{type(self.image_processor).__name__} does not give the same pixels when it resizes first and "
                "normalises later, so resized images cannot be kept for it: leave cache_images off."
            )

    def _is_two_steps(self) -> bool:
        """Compare resizing first and normalising later with the image processor's single step."""
        height, width = self.image_size
        noise = np.random.RandomState(0).randint(0, 256, (2 * height + 1, width + 3, 3), dtype=np.uint8)
        image = PILImage.fromarray(noise)
        direct = self.eval({"image": [image]})["pixel_values"]
        try:
            resized = _resized_for_eval(image, self.image_processor)
            later = self._eval_resized({"image": [resized]})["pixel_values"]
        except (TypeError, ValueError, RuntimeError):  # Some take no image that is not rescaled.
            return False
        return torch.equal(direct, later)


def _reorder(pixels: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    return pixels[list(order)]


def _resized_for_training(image: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    return v2.functional.resize(image, list(size))


def _resized_for_eval(image: PILImage.Image, processor: BaseImageProcessor) -> PILImage.Image:
    pixels = processor(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return PILImage.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8))


def _resized_copies(
    split: Dataset, rows: StoredRows, num_proc: int | None, resize: Callable[..., PILImage.Image], **settings: Any
) -> Dataset:
    """Resize the images of a split; `datasets` caches them under a fingerprint of all that they depend on."""
    return split.cast_column("image", Image(decode=False)).map(
        _resize_batch,
        with_indices=True,
        batched=True,
        batch_size=100,
        features=split.features,
        num_proc=num_proc,
        fn_kwargs={"rows": rows, "resize": resize, "settings": settings, "pillow": PILImage.__version__},
        desc="Resizing images",
    )


def _resize_batch(
    batch: Mapping[str, Any],
    indices: Sequence[int],
    rows: StoredRows,
    resize: Callable[..., PILImage.Image],
    settings: Mapping[str, Any],
    pillow: str,
) -> dict[str, Any]:
    """Resize and re-encode stored images; the version of Pillow only distinguishes caches."""
    copies = []
    for stored, index in zip(batch["image"], indices, strict=True):
        try:
            image = usable_rgb(None) if stored is None else RGB_IMAGE.decode_example(stored)
        except CorruptImageError as error:
            raise rows.name_corrupt(index, error) from error
        # Uncompressed, because PNG takes as long to decode as the JPEG that it stands for.
        file = io.BytesIO()
        resize(image, **settings).save(file, "BMP")
        copies.append({"bytes": file.getvalue(), "path": None})
    return {"image": copies}


def matching_image_processor(
    processor: BaseImageProcessor | None, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> BaseImageProcessor:
    """Return the processor itself if it saves itself and makes the images of the model; else a `ViTImageProcessor`.

    Args:
        processor: image processor of a backbone, or None. timm's is replaced, because it cannot be saved on its own.
        image_size: (height, width) of the model's input in pixels.
        mean, std: normalisation of the model, one value per channel.

    Raises:
        ValueError: the processor does not match and flips channels, which its replacement would not.
    """
    # Looked up here: importing timm with this module would double the time that the trainer takes to import.
    if processor is not None and not isinstance(processor, transformers.TimmWrapperImageProcessor):
        pixels = measure_pixels(processor, image_size)
        if pixels.size == tuple(image_size) and pixels.agrees(mean, std):
            return processor
        if pixels.order != (0, 1, 2):
            raise ValueError(
                f"{type(processor).__name__} flips the colour channels and makes images of {_size(pixels.size)} "
                f"pixels with mean {list(pixels.mean)} and std {list(pixels.std)}: give it the model's size "
                f"({_size(image_size)}), mean ({list(mean)}) and std ({list(std)})."
            )
    height, width = image_size
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=list(mean), image_std=list(std))


def _features(pixel_values: torch.Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {"pixel_values": pixel_values} | ({"labels": batch["label"]} if "label" in batch else {})


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
