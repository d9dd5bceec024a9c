"""Tests of `vpns_hf.pixels`: which values an image processor makes, measured on plain images."""

import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    Siglip2ImageProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
    VivitImageProcessor,
)

from vpns_hf.pixels import measure_pixels

SIDE = {"height": 16, "width": 16}


class Mixing(ViTImageProcessor):
    """Turns images grey."""

    def __call__(self, *args, **kwargs):
        batch = super().__call__(*args, **kwargs)
        return {"pixel_values": batch["pixel_values"].mean(1, keepdim=True).expand(-1, 3, -1, -1)}


class Bending(ViTImageProcessor):
    """Applies a gamma curve."""

    def __call__(self, *args, **kwargs):
        return {"pixel_values": super().__call__(*args, **kwargs)["pixel_values"] ** 2}


@pytest.mark.parametrize("kind", [ViTImageProcessor, ViTImageProcessorPil, CLIPImageProcessor])
def test_stated_values_are_kept_where_they_hold(kind):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    size = {"size": SIDE} if kind is not CLIPImageProcessor else {"size": {"shortest_edge": 16}, "crop_size": SIDE}
    pixels = measure_pixels(kind(image_mean=mean, image_std=std, **size), (16, 16))
    assert (list(pixels.mean), list(pixels.std)) == (mean, std)
    assert (pixels.order, pixels.size, pixels.padding) == ((0, 1, 2), (16, 16), (0, 0, 0, 0))
    assert not pixels.letterboxes


def test_values_that_settings_do_not_say():
    """An affine map, by hand: (2x - 0.5) / 0.5 = (x - 0.25) / 0.25; MobileViT only flips; its border is 16 wide."""
    rescaled = measure_pixels(ViTImageProcessor(size=SIDE, rescale_factor=2 / 255), (16, 16))
    assert (rescaled.mean, rescaled.std) == ((0.25,) * 3, (0.25,) * 3)
    twice = measure_pixels(EfficientNetImageProcessor(size=SIDE), (16, 16))
    assert (twice.mean, twice.std) == ((0.5,) * 3, (0.25,) * 3)
    flipped = measure_pixels(MobileViTImageProcessor(), (256, 256))
    assert (flipped.mean, flipped.std, flipped.order) == ((0.0,) * 3, (1.0,) * 3, (2, 1, 0))
    assert (flipped.padding, flipped.border) == ((16,) * 4, (0.0,) * 3)


def test_the_map_predicts_any_plain_image():
    processor = ViTImageProcessor(
        size=SIDE, rescale_factor=1 / 100, image_mean=[0.1, 0.2, 0.3], image_std=[0.7, 0.5, 2.0]
    )
    pixels, colour = measure_pixels(processor, (16, 16)), np.array([17, 99, 230], dtype=np.uint8)
    made = processor(np.tile(colour, (20, 30, 1)), return_tensors="pt", input_data_format="channels_last")
    expected = (colour[list(pixels.order)] / 255 - np.array(pixels.mean)) / np.array(pixels.std)
    torch.testing.assert_close(made["pixel_values"][0, :, 5, 5].double(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        (Mixing(size=SIDE), "does not keep the colour channels apart"),
        (Bending(size=SIDE, do_normalize=False), "does not scale pixels by one factor per channel"),
        (Siglip2ImageProcessor(), r"makes pixel_values of shape \(256, 768\) of an RGB image"),
        (VivitImageProcessor(), "makes pixel_values of shape .* of an RGB image"),
        (ViTImageProcessor(size=SIDE, image_mean=[0.1, 0.2], image_std=[1, 1]), "cannot process a plain RGB image"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_processors_without_such_a_map_are_refused(processor, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure_pixels(processor, (16, 16))
