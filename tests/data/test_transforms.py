"""Tests of `vpns_hf.transforms`: the views of an image."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel
from helpers.models import _timm, tiny_model
from helpers.pictures import in_memory, picture
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DonutImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    PPLCNetImageProcessor,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
    pipeline,
)

from vpns_hf import PromptedSparseModel, VPNsTrainer, VPNsTrainingArguments
from vpns_hf.data import CorruptImageError, ImageTransforms, load_transfer_dataset, matching_image_processor
from vpns_hf.data.transforms import AUGMENTATIONS
from vpns_hf.pixels import measure_pixels


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
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
        processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=mean, image_std=std)
        transforms = ImageTransforms(processor, (8, 8), mean, std)
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
        pixels = measure_pixels(processor, (16, 16))
        transforms = ImageTransforms(processor, (16, 16), pixels.mean, pixels.std)
        batch = transforms.eval({"image": images, "label": [0] * 4})
        assert torch.equal(batch["pixel_values"], torch.cat(fed).cpu())
        assert torch.equal(
            batch["pixel_values"], processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
        )
        assert batch["labels"] == [0] * 4

    def test_eval_view_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match="makes images of 8 x 8 pixels and the model takes 16 x 16"):
            ImageTransforms(ViTImageProcessor(size={"height": 8, "width": 8}), (16, 16), (0.5,) * 3, (0.5,) * 3)
        transforms = ImageTransforms(ViTImageProcessor(do_resize=False), (16, 16), (0.5,) * 3, (0.5,) * 3)
        with pytest.raises(ValueError, match="makes images of 8 x 10 pixels and the model takes 16 x 16"):
            transforms.eval({"image": [picture(0)]})

    def test_views_of_a_data_set(self):
        data = load_transfer_dataset(in_memory(["a", "b"] * 10))["train"]
        transforms = pickle.loads(pickle.dumps(vit_transforms()))
        row = data.with_transform(transforms.eval)[3]
        assert row["pixel_values"].shape == (3, 16, 16)
        assert row["labels"] == data[3]["label"]

    @pytest.mark.parametrize("augmentation", AUGMENTATIONS)
    def test_augmentations(self, augmentation):
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        transforms = ImageTransforms(processor, (16, 16), (0.5,) * 3, (0.5,) * 3, augmentation)
        batch = {"image": [picture(0, size=(40, 30))] * 12, "label": [1] * 12}
        torch.manual_seed(0)
        train, plain = transforms.train(batch), transforms.eval(batch)["pixel_values"]
        assert train["labels"] == [1] * 12
        assert train["pixel_values"].shape == plain.shape
        assert torch.isfinite(train["pixel_values"]).all()
        distinct = len({view.numpy().tobytes() for view in train["pixel_values"]})
        assert distinct == 1 if augmentation == "none" else distinct > 6
        assert torch.equal(train["pixel_values"], plain) == (augmentation == "none")

    def test_augmentations_differ(self):
        """RandAugment and TrivialAugment come on top of the crops and flips of the paper, under the same draws."""
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        batch, views = {"image": [picture(i, size=(40, 30)) for i in range(20)]}, {}
        for augmentation in ("paper", "randaugment", "trivialaugment"):
            torch.manual_seed(0)
            transforms = ImageTransforms(processor, (16, 16), (0.5,) * 3, (0.5,) * 3, augmentation)
            views[augmentation] = transforms.train(batch)["pixel_values"]
        # Colours that no crop or flip of these pictures can have.
        spread = {name: float(view.flatten(1).std(1).std()) for name, view in views.items()}
        assert spread["randaugment"] > 2 * spread["paper"]
        assert spread["trivialaugment"] > 2 * spread["paper"]
        with pytest.raises(ValueError, match="'cutmix': expected one of paper, randaugment, trivialaugment, none"):
            ImageTransforms(processor, (16, 16), (0.5,) * 3, (0.5,) * 3, "cutmix")


SIDE = {"height": 16, "width": 16}
UNUSUAL = {
    "flipped": (lambda: MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size=SIDE), (0,) * 3, (1,) * 3),
    "flipped and normalised": (
        lambda: PPLCNetImageProcessor(size=SIDE, crop_size=SIDE, resize_short=16),
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
    ),
    "border": (lambda: MobileViTImageProcessor(size={"shortest_edge": 12}, crop_size=SIDE), (0,) * 3, (1,) * 3),
    "border of another value": (
        lambda: CLIPImageProcessor(
            size={"shortest_edge": 12}, crop_size=SIDE, image_mean=[0.5] * 3, image_std=[1.0] * 3
        ),
        (0.5,) * 3, (1,) * 3,
    ),
    "twice normalised": (lambda: EfficientNetImageProcessor(size=SIDE), (0.5,) * 3, (0.25,) * 3),
    "not normalised": (lambda: ViTImageProcessor(size=SIDE, do_normalize=False), (0,) * 3, (1,) * 3),
    "rescaled to 0..2": (lambda: ViTImageProcessor(size=SIDE, rescale_factor=1 / 127.5), (0.25,) * 3, (0.25,) * 3),
    "not rescaled": (
        lambda: ViTImageProcessor(size=SIDE, do_rescale=False, do_normalize=False), (0,) * 3, (1 / 255,) * 3
    ),
}  # fmt: skip


class TestUnusualProcessors:
    """The training view follows the image processor, or is refused."""

    @pytest.mark.parametrize("name", UNUSUAL)
    @pytest.mark.parametrize("colour", [(200, 100, 20), (0, 0, 0), (255, 255, 255), (3, 250, 90)])
    def test_both_views_of_a_plain_image_are_equal(self, name, colour):
        build, mean, std = UNUSUAL[name]
        transforms = pickle.loads(pickle.dumps(ImageTransforms(build(), (16, 16), mean, std)))
        batch = {"image": [Image.new("RGB", (40, 40), colour)]}
        train, plain = (view(batch)["pixel_values"] for view in (transforms.train, transforms.eval))
        torch.testing.assert_close(train, plain.float(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", UNUSUAL)
    def test_the_stated_normalisation_is_refused(self, name):
        processor, mean, std = UNUSUAL[name][0](), *UNUSUAL[name][1:]
        other = [value + 0.05 for value in mean]
        with pytest.raises(ValueError, match=r"normalises images with mean .* in effect, and the model expects mean"):
            ImageTransforms(processor, (16, 16), other, std)

    def test_letterboxes_are_refused_where_training_images_are_stretched(self):
        processor = DonutImageProcessor(size=SIDE, do_align_long_axis=False)
        with pytest.raises(
            ValueError, match=r"adds borders to images of another aspect ratio, .* augmentation 'none'"
        ):
            ImageTransforms(processor, (16, 16), (0.5,) * 3, (0.5,) * 3)
        transforms = ImageTransforms(processor, (16, 16), (0.5,) * 3, (0.5,) * 3, "none")
        batch = {"image": [picture(0, size=(40, 20))]}
        assert torch.equal(transforms.train(batch)["pixel_values"], transforms.eval(batch)["pixel_values"])

    def test_models_of_one_channel_are_refused(self):
        with pytest.raises(ValueError, match="images of 1 channels, and image processors and pipelines make RGB"):
            ImageTransforms(ViTImageProcessor(size=SIDE), (16, 16), (0.5,), (0.5,))

    def test_a_processor_that_does_not_match_the_model_is_replaced(self):
        model = (16, 16), (0.4,) * 3, (0.2,) * 3
        replaced = matching_image_processor(ViTImageProcessor(size=SIDE), *model)
        assert (replaced.image_mean, replaced.image_std) == ((0.4,) * 3, (0.2,) * 3)
        own = ViTImageProcessor(size=SIDE, image_mean=[0.4] * 3, image_std=[0.2] * 3)
        assert matching_image_processor(own, *model) is own
        with pytest.raises(ValueError, match="flips the colour channels and makes images of 16 x 16 pixels with mean"):
            matching_image_processor(UNUSUAL["flipped"][0](), (24, 24), *model[1:])


PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size={"height": 24, "width": 16}),
    "vit_pil": lambda: ViTImageProcessorPil(size={"height": 24, "width": 16}),
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 24, "width": 16}),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.8),
}


class TestCachedImages:
    @pytest.fixture
    def splits(self, tmp_path):
        raw = in_memory([0, 1] * 12, ClassLabel(names=["x", "y"]))
        raw = raw.select(range(20)).add_column("n", list(range(20)))
        raw.save_to_disk(tmp_path / "data")
        return load_transfer_dataset(tmp_path / "data")

    def both(self, transforms, splits, name="train", **options):
        direct = [splits.view(name, view) for view in (transforms.train, transforms.eval)]
        arguments = (splits[name], splits.rows[name])
        cached = [
            transforms.cached_train_view(*arguments, **options),
            transforms.cached_eval_view(*arguments, **options),
        ]
        return zip(direct, cached, strict=True)

    @pytest.mark.parametrize("name", PROCESSORS)
    def test_the_same_pixels_bit_for_bit(self, splits, name):
        processor = PROCESSORS[name]()
        size = (24, 24) if name == "convnext" else (24, 16)
        transforms = ImageTransforms(processor, size, processor.image_mean, processor.image_std)
        for direct, cached in self.both(transforms, splits):
            assert len(direct) == len(cached)
            for index in range(len(direct)):
                torch.manual_seed(index)
                expected = direct[index]
                torch.manual_seed(index)
                found = cached[index]
                assert torch.equal(expected["pixel_values"], found["pixel_values"])
                assert expected["labels"] == found["labels"]

    def test_copies_are_small_and_made_once(self, splits, monkeypatch):
        transforms = vit_transforms()
        view = transforms.cached_train_view(splits["train"], splits.rows["train"])
        assert {image.size for image in view.split.with_format(None)["image"]} == {(18, 18)}
        transforms.train({"image": [picture(0)]})  # what a view keeps for itself must not change what is cached
        (made,) = (Path(each["filename"]) for each in view.split.cache_files)
        changed = made.stat().st_mtime_ns
        again = vit_transforms().cached_train_view(splits["train"], splits.rows["train"])
        assert [each["filename"] for each in again.split.cache_files] == [str(made)]
        assert made.stat().st_mtime_ns == changed
        larger = vit_transforms(32, 32).cached_train_view(splits["train"], splits.rows["train"])
        assert {image.size for image in larger.split.with_format(None)["image"]} == {(36, 36)}

    def test_with_several_processes(self, splits):
        for direct, cached in self.both(vit_transforms(), splits, num_proc=2):
            torch.manual_seed(0)
            expected = direct[7]["pixel_values"]
            torch.manual_seed(0)
            assert torch.equal(expected, cached[7]["pixel_values"])

    def test_without_augmentation(self, splits):
        transforms = replace(vit_transforms(), augmentation="none")
        view = transforms.cached_train_view(splits["train"], splits.rows["train"])
        assert torch.equal(view[3]["pixel_values"], splits.view("train", transforms.eval)[3]["pixel_values"])

    def test_a_processor_that_cannot_be_split_is_refused(self, splits):
        class Doubling(ViTImageProcessor):
            def __call__(self, *args, **kwargs):
                batch = super().__call__(*args, **kwargs)
                return {"pixel_values": 2 * batch["pixel_values"].float()}

        for kind in (Doubling, EfficientNetImageProcessor):
            processor = kind(size={"height": 16, "width": 16})
            pixels = measure_pixels(processor, (16, 16))
            transforms = ImageTransforms(processor, (16, 16), pixels.mean, pixels.std)
            with pytest.raises(ValueError, match=rf"{kind.__name__} does not give the same .* leave cache_images"):
                transforms.cached_eval_view(splits["train"], splits.rows["train"])

    def test_a_corrupt_image_is_named(self):
        rows = [{"image": {"bytes": b"x" if i == 4 else png(i), "path": f"{i}.png"}, "label": 0} for i in range(8)]
        features = datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=["x"])})
        data = datasets.Dataset.from_list(rows, features=features)
        splits = load_transfer_dataset(datasets.DatasetDict(train=data, validation=data, test=data))
        with pytest.raises(CorruptImageError, match=r"The image validation\[4\] cannot be used \(4.png"):
            vit_transforms().cached_train_view(splits["validation"], splits.rows["validation"])


def png(value: int) -> bytes:
    content = io.BytesIO()
    picture(value).save(content, "PNG")
    return content.getvalue()


class TestInputSizes:
    """Images of another size than the backbone was trained on."""

    @pytest.fixture
    def splits(self):
        return load_transfer_dataset(in_memory([0, 1] * 20, ClassLabel(names=["x", "y"])))

    @pytest.mark.parametrize(("family", "size"), [("vit", 48), ("deit", 40), ("dinov2", 24), ("resnet", 48)])
    def test_training_at_another_size(self, splits, tmp_path, family, size):
        model = tiny_model(family, image_size=size, num_labels=2)
        processor = matching_image_processor(None, *model.config.geometry)
        transforms = ImageTransforms(processor, *model.config.geometry)
        assert transforms.image_size == (size, size)
        args = VPNsTrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = VPNsTrainer(
            model, args, splits.view("train", transforms.train), splits.view("validation", transforms.eval), processor
        )
        trainer.train()
        trainer.save_model()
        loaded = PromptedSparseModel.from_pretrained(tmp_path).eval()
        pixels = torch.stack([row["pixel_values"] for row in trainer.eval_dataset])
        assert pixels.shape[-2:] == (size, size)
        with torch.no_grad():
            assert torch.equal(loaded(pixels).logits, trainer.model.eval()(pixels).logits)

    @pytest.mark.parametrize(
        ("architecture", "arguments"),
        [
            (
                "swin_tiny_patch4_window7_224",
                {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
            ),
            ("test_vit", {"dynamic_img_size": False}),
        ],
    )
    def test_a_backbone_of_one_size_says_so(self, architecture, arguments):
        config = _timm(architecture, img_size=32, **arguments)
        assert tiny_model(AutoModelForImageClassification.from_config(config)).config.image_size == [32, 32]
        with pytest.raises(ValueError, match=r"does not accept images of \(48, 48\) \(height, width\) .*32"):
            tiny_model(AutoModelForImageClassification.from_config(config), image_size=48)
