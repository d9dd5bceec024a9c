"""Tests of `vpns_hf.transforms`: the views of an image."""

import pickle

import pytest
import torch
from pictures import in_memory, picture
from PIL import Image
from transformers import (
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
    pipeline,
)

from vpns_hf.data import load_transfer_dataset
from vpns_hf.transforms import ImageTransforms


def timm_processor(height: int = 16, width: int = 16) -> TimmWrapperImageProcessor:
    config = {"input_size": (3, height, width), "mean": (0.4,) * 3, "std": (0.2,) * 3, "crop_pct": 0.9}
    return TimmWrapperImageProcessor({**config, "interpolation": "bicubic"}, architecture="vit_tiny_patch16_224")


def vit_transforms(height: int = 16, width: int = 16) -> ImageTransforms:
    processor = ViTImageProcessor(size={"height": height, "width": width})
    return ImageTransforms(processor, (height, width), processor.image_mean, processor.image_std)


class TestTransforms:
    @pytest.mark.parametrize("size", [(16, 16), (24, 16), (9, 31)])
    def test_train_view(self, size):
        images = [picture(i, size=(20 + i, 13)) for i in range(3)]
        batch = vit_transforms(*size).train({"image": images, "label": [2, 0, 1]})
        assert batch["pixel_values"].shape == (3, 3, *size)
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["labels"] == [2, 0, 1]

    def test_train_view_follows_torch_seed_and_draws_for_each_image(self):
        transforms, image = vit_transforms(), picture(0)
        torch.manual_seed(0)
        first = transforms.train({"image": [image] * 8})["pixel_values"]
        torch.manual_seed(0)
        assert torch.equal(first, transforms.train({"image": [image] * 8})["pixel_values"])
        assert len({view.numpy().tobytes() for view in first}) > 2

    def test_train_view_of_a_flat_image_is_its_normalised_colour(self):
        image = Image.new("RGB", (30, 20), (51, 102, 204))
        transforms = ImageTransforms(ViTImageProcessor(), (8, 8), (0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
        view = transforms.train({"image": [image]})["pixel_values"][0]
        expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 0.2])
        torch.testing.assert_close(view, expected[:, None, None].expand(3, 8, 8))

    @pytest.mark.parametrize(
        "processor",
        [
            ViTImageProcessor(size={"height": 16, "width": 16}),
            ViTImageProcessorPil(size={"height": 16, "width": 16}),
            timm_processor(),
        ],
        ids=lambda processor: type(processor).__name__,
    )
    def test_eval_view_is_what_the_pipeline_feeds(self, processor):
        config = ViTConfig(
            image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        model, fed = ViTForImageClassification(config).eval(), []
        model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["pixel_values"]), with_kwargs=True)
        images = [picture(0), picture(1, "L", (28, 28)), picture(2, size=(40, 17)), picture(3, "P")]
        pipeline("image-classification", model=model, image_processor=processor)(images)
        batch = ImageTransforms(processor, (16, 16), (0.5,) * 3, (0.5,) * 3).eval({"image": images, "label": [0] * 4})
        assert torch.equal(batch["pixel_values"], torch.cat(fed).cpu())
        assert torch.equal(
            batch["pixel_values"], processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        )
        assert batch["labels"] == [0] * 4

    def test_eval_view_of_another_size_is_refused(self):
        transforms = ImageTransforms(
            ViTImageProcessor(size={"height": 8, "width": 8}), (16, 16), (0.5,) * 3, (0.5,) * 3
        )
        with pytest.raises(ValueError, match="makes images of 8 x 8 pixels and the model takes 16 x 16"):
            transforms.eval({"image": [picture(0)]})

    def test_views_of_a_data_set(self):
        data = load_transfer_dataset(in_memory(["a", "b"] * 10))["train"]
        transforms = pickle.loads(pickle.dumps(vit_transforms()))
        row = data.with_transform(transforms.eval)[3]
        assert row["pixel_values"].shape == (3, 16, 16)
        assert row["labels"] == data[3]["label"]
