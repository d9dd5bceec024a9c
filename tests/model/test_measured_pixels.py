"""Mean and std of a model are those that its image processor really applies."""

import pytest
from helpers.models import tiny_backbone
from transformers import EfficientNetImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from vpns_hf import PromptedSparseModel

SIZE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        (ViTImageProcessor(size=SIZE), 0.5, 0.5),
        (ViTImageProcessor(size=SIZE, rescale_factor=1 / 127.5), 0.25, 0.25),
        (ViTImageProcessor(size=SIZE, do_normalize=False), 0.0, 1.0),
        (MobileViTImageProcessor(size=SIZE, crop_size=SIZE), 0.0, 1.0),
        (ViTImageProcessor(size=SIZE, image_mean=0.25, image_std=0.5), 0.25, 0.5),
        (ViTImageProcessor(size=SIZE, image_mean=True, image_std=True), 1.0, 1.0),
    ],
)
def test_mean_and_std_are_measured(processor, mean, std):
    model = PromptedSparseModel.from_backbone(
        tiny_backbone("vit"), sparsity=0.5, prompt="pad", prompt_size=4, image_processor=processor
    )
    assert model.config.image_mean == pytest.approx([mean] * 3, abs=1e-3)
    assert model.config.image_std == pytest.approx([std] * 3, abs=1e-3)


def test_a_second_normalisation_is_measured():
    processor = EfficientNetImageProcessor(size=SIZE, include_top=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = PromptedSparseModel.from_backbone(
        tiny_backbone("vit"), sparsity=0.5, prompt="pad", prompt_size=4, image_processor=processor
    )
    assert model.config.image_std == pytest.approx([0.25] * 3, abs=2e-3)
