"""Plain models and ONNX files give the logits of the model that they came from."""

import json
import os
import sys

import numpy as np
import pytest
import timm
import torch
from helpers.models import CONFIGS, tiny_model
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from vpns_hf.export import export_onnx, export_plain, plain_model
from vpns_hf.model import PROMPTS

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NAMES = {0: "cat", 1: "dog", 2: "owl"}


def lively(model):
    """Weights and a prompt large enough that logits differ from image to image."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.startswith("prompt."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "prompt" in name else 0.2))
    return model


def frozen(backbone="vit", **kwargs):
    settings = dict(image_mean=MEAN, image_std=STD) | kwargs
    model = lively(tiny_model(backbone, **settings))
    model.update_masks()
    model.freeze_masks()
    return model.eval()


def images(count=3, size=(32, 32)):
    pixels = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(2))
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def on_black(pixel_values, inner):
    """Shrunk to `inner` and centred on black, by hand."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = F.interpolate(pixel_values * std + mean, size=inner, mode="bilinear", antialias=True)
    canvas = torch.zeros_like(pixel_values)
    top, left = (canvas.shape[2] - inner[0]) // 2, (canvas.shape[3] - inner[1]) // 2
    canvas[:, :, top : top + inner[0], left : left + inner[1]] = pixels
    return (canvas - mean) / std


def assert_same(found, expected):
    assert expected.std(0).max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Plain models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_a_plain_folder_gives_the_same_logits(family, tmp_path):
    model = frozen(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_plain(model, tmp_path / "plain")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    assert type(plain) is type(model.backbone)
    with torch.no_grad():
        torch.testing.assert_close(plain(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-5)
    assert model.config.state == "frozen"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [name for name in os.listdir(tmp_path) if name != "plain"]


@torch.no_grad()
def test_the_search_state_exports_its_present_masks():
    model = lively(tiny_model())
    model.update_masks()
    plain = plain_model(model)
    assert_same(plain(images()).logits, model(images()).logits)
    zeros = (plain.classifier.weight == 0).float().mean()
    assert zeros == 0.5
    assert model.config.state == "search"
    assert model.scores()


@pytest.mark.parametrize("family", ["timm_vit", "timm_resnet"])
@torch.no_grad()
def test_timm_loads_a_timm_backbone(family, tmp_path):
    model = frozen(family)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    export_plain(model, tmp_path / "plain", processor)
    assert sorted(os.listdir(tmp_path / "plain")) == ["config.json", "model.safetensors"]
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    assert_same(plain(images()), model(images()).logits)
    assert plain.pretrained_cfg["label_names"] == list(model.config.id2label.values())
    picture = Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 150))
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(plain.pretrained_cfg))
    torch.testing.assert_close(transform(picture)[None], expected, rtol=0, atol=0.05)
    through_transformers = AutoImageProcessor.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(through_transformers(picture)["pixel_values"], expected, rtol=0, atol=0.05)


def test_timm_cannot_say_what_some_processors_do(tmp_path):
    class Upside(ViTImageProcessor):
        def resize(self, image, *args, **kwargs):
            return super().resize(image, *args, **kwargs).flip(-2)

    processor = Upside(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    with pytest.raises(ValueError, match="timm has no preprocessing that equals this Upside"):
        export_plain(frozen("timm_resnet"), tmp_path / "plain", processor)
    assert not os.listdir(tmp_path)


def test_the_processor_and_labels_travel_with_the_model(tmp_path):
    model = frozen(num_labels=3, id2label=NAMES)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    export_plain(model, tmp_path / "plain", processor)
    classify = pipeline("image-classification", model=str(tmp_path / "plain"))
    assert type(classify.model) is ViTForImageClassification
    picture = Image.radial_gradient("L").convert("RGB")
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model(pixel_values).logits.softmax(-1)[0]
    assert {each["label"]: pytest.approx(each["score"], abs=1e-5) for each in classify(picture)} == {
        NAMES[index]: float(value) for index, value in enumerate(probabilities)
    }


def test_half_precision_stays(tmp_path):
    export_plain(frozen().bfloat16(), tmp_path / "plain")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "plain").dtype == torch.bfloat16


def test_a_folder_that_holds_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; name a new folder"):
        export_plain(frozen(), tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_model_whose_logits_would_change_is_refused(tmp_path):
    class ShiftedViTForImageClassification(ViTForImageClassification):
        def forward(self, *args, interpolate_pos_encoding=False, **kwargs):
            output = super().forward(*args, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
            output.logits = output.logits + interpolate_pos_encoding
            return output

    model = frozen(ShiftedViTForImageClassification(CONFIGS["vit"]()), image_size=48)
    with pytest.raises(ValueError, match="does not give the logits of this model"):
        export_plain(model, tmp_path / "plain")
    assert not os.listdir(tmp_path)


# Another image size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "swin", "convnext", "resnet"])
@torch.no_grad()
def test_another_image_size_needs_no_argument_afterwards(family):
    model = frozen(family, image_size=48)
    pixel_values = images(size=(48, 48))
    plain = plain_model(model)
    assert_same(plain(pixel_values).logits, model(pixel_values).logits)
    assert plain.config.to_dict().get("image_size", 48) == 48


@torch.no_grad()
def test_another_image_size_that_is_not_square():
    model = frozen("vit", image_size=(32, 48))
    pixel_values = images(size=(32, 48))
    assert_same(plain_model(model)(pixel_values).logits, model(pixel_values).logits)


def test_relative_positions_of_another_size_are_refused():
    backbone = AutoModelForImageClassification.from_config(CONFIGS["beit"]())
    backbone.config.use_relative_position_bias = True
    backbone = type(backbone)(backbone.config)
    with pytest.raises(ValueError, match="takes images of 48 x 48 pixels only in calls with"):
        plain_model(frozen(backbone, image_size=48))


# Label mappings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "resnet", "timm_vit", "timm_vgg"])
@pytest.mark.parametrize("state", ["kept", "open", "sliced", "bayesian"])
@torch.no_grad()
def test_label_mappings_become_part_of_the_head(family, state):
    mapping = torch.rand(6, 3) if state == "bayesian" else torch.tensor([4, 0, 5])
    settings = dict(label_mapping="bayesian" if state == "bayesian" else "iterative", keep_source_head=state == "kept")
    model = lively(tiny_model(family, id2label=NAMES, image_mean=MEAN, image_std=STD, **settings))
    model.set_label_mapping(mapping, final=state != "open")
    plain = plain_model(model)
    assert plain.config.id2label == NAMES
    expected = model(images()).logits
    assert expected.shape == (3, 3)
    assert_same(plain(images()).logits, expected)


def test_without_a_mapping_yet_the_source_classes_stay():
    model = tiny_model(id2label=NAMES, label_mapping="frequency")
    assert plain_model(model).config.num_labels == 6


@torch.no_grad()
def test_as_many_target_as_source_classes():
    model = lively(tiny_model(num_labels=6, label_mapping="bayesian"))
    model.set_label_mapping(torch.rand(6, 6))
    assert_same(plain_model(model)(images()).logits, model(images()).logits)


# Prompts -------------------------------------------------------------------------------------------------------------

FOLDABLE = {
    "pad": dict(prompt="pad", prompt_size=4, prompt_inner_size=(24, 24)),
    "pad across patches": dict(prompt="pad", prompt_size=3, prompt_inner_size=(21, 19)),
    "expand": dict(prompt="expand", prompt_size=5),
    "fixed": dict(prompt="fixed", prompt_size=5, prompt_inner_size=(20, 22)),
}


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "timm_vit"])
@pytest.mark.parametrize("prompt", FOLDABLE)
@torch.no_grad()
def test_a_prompt_beside_the_image_is_folded_exactly(family, prompt):
    model = frozen(family, **FOLDABLE[prompt])
    expected = model(images(), use_prompt=True).logits
    prepared = on_black(images(), model.prompt.inner_size)
    plain = plain_model(model, use_prompt=True)
    assert_same(plain(prepared).logits, expected)
    # The prompt matters here, so equal logits show that it is there.
    assert (model.backbone(prepared).logits - expected).abs().max() > 0.01


@torch.no_grad()
def test_a_folded_prompt_at_another_image_size():
    model = frozen("vit", image_size=48, **FOLDABLE["expand"])
    prepared = on_black(images(size=(48, 48)), (38, 38))
    expected = model(images(size=(48, 48)), use_prompt=True).logits
    assert_same(plain_model(model, use_prompt=True)(prepared).logits, expected)


@pytest.mark.parametrize("family", ["vit", "timm_vit"])
@torch.no_grad()
def test_the_processor_places_the_image_for_a_folded_prompt(family, tmp_path):
    model = frozen(family, **FOLDABLE["expand"])
    model.config.use_prompt = True
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    export_plain(model, tmp_path / "plain", processor)
    # At the model's own size the wrapped model resizes once, too.
    picture = Image.radial_gradient("L").convert("RGB").resize((32, 32))
    placed = AutoImageProcessor.from_pretrained(tmp_path / "plain")(picture, return_tensors="pt")["pixel_values"]
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(placed, on_black(pixel_values, (22, 22)), rtol=0, atol=0.05)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(placed).logits, model(pixel_values).logits, rtol=0.02, atol=0.02)


def test_a_processor_that_crops_cannot_place(tmp_path):
    settings = dict(size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    processor = ViTImageProcessor(image_mean=MEAN, image_std=STD, **settings)
    with pytest.raises(ValueError, match="does more than to resize"):
        export_plain(frozen(**FOLDABLE["expand"]), tmp_path / "plain", processor, use_prompt=True)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("prompt", [name for name in PROMPTS if name != "expand"])
def test_a_prompt_on_the_image_is_refused(prompt, tmp_path):
    model = frozen(prompt=prompt)
    model.config.use_prompt = True
    with pytest.raises(ValueError, match="overlaps the image, so its effect changes with the image"):
        export_plain(model, tmp_path / "plain")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("family", ["resnet", "swin", "timm_resnet"])
def test_a_backbone_without_position_embeddings_cannot_hold_a_prompt(family):
    with pytest.raises(ValueError, match="cannot be folded"):
        plain_model(frozen(family, **FOLDABLE["pad"]), use_prompt=True)


@torch.no_grad()
def test_a_prompt_that_is_left_out_on_request_is_said_to_be_lost(tmp_path, caplog):
    model = frozen()
    export_plain(model, tmp_path / "default")
    assert not caplog.messages
    model.config.use_prompt = True
    export_plain(model, tmp_path / "plain", use_prompt=False)
    assert caplog.messages == [
        "This model is evaluated with its prompt, and the export leaves it out: its accuracy is that without the "
        "prompt."
    ]
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert_same(plain(images()).logits, model(images(), use_prompt=False).logits)


def test_a_prompt_that_is_not_there_is_refused(tmp_path):
    for export in (export_plain, export_onnx):
        with pytest.raises(ValueError, match="this model has no prompt"):
            export(frozen(prompt=None), tmp_path / "out", use_prompt=True)


# ONNX ----------------------------------------------------------------------------------------------------------------


def session_of(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_onnx(path, model, use_prompt, size=(32, 32)):
    session = session_of(path)
    assert os.listdir(path.parent) == [path.name]
    for count in (1, 2, 5):
        pixel_values = images(count, size)
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            expected = model(pixel_values, use_prompt=use_prompt).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    return session


def operators(graph):
    """Every operator of a graph and of the graphs within it."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            yield from operators(attribute.g)


@pytest.mark.parametrize(
    ("family", "use_prompt"),
    [
        ("vit", True),
        ("resnet", True),
        ("timm_resnet", False),
        pytest.param("vit", False, marks=pytest.mark.slow),
        pytest.param("resnet", False, marks=pytest.mark.slow),
        pytest.param("timm_resnet", True, marks=pytest.mark.slow),
        pytest.param("timm_vit", False, marks=pytest.mark.slow),
        pytest.param("timm_vit", True, marks=pytest.mark.slow),
        pytest.param("swin", True, marks=pytest.mark.slow),
        pytest.param("dinov2", True, marks=pytest.mark.slow),
    ],
)
def test_onnx_gives_the_same_logits_for_any_batch(family, use_prompt, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = frozen(family)
    export_onnx(model, tmp_path / "model.onnx", use_prompt=use_prompt)
    session = assert_onnx(tmp_path / "model.onnx", model, use_prompt)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["id2label"]) == {str(k): v for k, v in model.config.id2label.items()}
    assert json.loads(metadata["image_mean"]) == MEAN
    assert json.loads(metadata["use_prompt"]) is use_prompt
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not {"If", "Loop", "Scan"} & set(operators(graph))
    assert [each.name for each in graph.input] == ["pixel_values"]


@pytest.mark.parametrize(
    "prompt", ["expand", *(pytest.param(name, marks=pytest.mark.slow) for name in PROMPTS if name != "expand")]
)
def test_onnx_with_every_prompt_on_a_shrunk_image(prompt, tmp_path):
    model = frozen("resnet", prompt=prompt, prompt_size=4, prompt_inner_size=(20, 23))
    model.config.use_prompt = True
    export_onnx(model, tmp_path / "model.onnx")
    assert_onnx(tmp_path / "model.onnx", model, use_prompt=True)


def test_onnx_of_a_searching_half_precision_model_with_a_label_mapping(tmp_path):
    model = lively(tiny_model("resnet", id2label=NAMES, label_mapping="bayesian", image_mean=MEAN, image_std=STD))
    model.set_label_mapping(torch.rand(6, 3))
    export_onnx(model.bfloat16(), tmp_path / "model.onnx", opset=18)
    assert model.config.state == "search"
    assert_onnx(tmp_path / "model.onnx", model.float(), use_prompt=False)


@pytest.mark.parametrize(("family", "opset"), [("vit", 13), ("vit", 15), ("resnet", 13), ("resnet", 20)])
def test_onnx_files_have_the_opset_that_was_requested_or_are_not_written(family, opset, tmp_path):
    onnx = pytest.importorskip("onnx")
    try:
        export_onnx(frozen(family), tmp_path / "model.onnx", opset=opset)
    except ValueError as error:
        assert f"instead of opset {opset} for this model; pass `opset=" in str(error)  # noqa: PT017  # both are right
        assert not list(tmp_path.iterdir())
    else:
        assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset


@pytest.mark.slow
def test_onnx_at_another_image_size(tmp_path):
    model = frozen("vit", image_size=48)
    export_onnx(model, tmp_path / "model.onnx")
    assert_onnx(tmp_path / "model.onnx", model, False, size=(48, 48))


def test_onnx_that_differs_is_not_written(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args):
            return [np.add(super().run(*args)[0], 0.1)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    (tmp_path / "model.onnx").write_text("an older file")
    with pytest.raises(ValueError, match=r"The ONNX file does not give the logits .* 0\.1"):
        export_onnx(frozen("resnet"), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older file"


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "vpns-hf\[onnx\]"'):
        export_onnx(frozen("resnet"), tmp_path / "model.onnx")
