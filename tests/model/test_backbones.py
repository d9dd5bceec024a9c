"""Backbones that were changed, or created or saved by timm: wrapped as they are, or refused."""

import copy
import json
import resource

import pytest
import timm
import torch
from helpers.models import tiny_backbone, tiny_model
from timm.models import save_for_hf
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    PvtConfig,
    PvtForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTForImageClassification,
)

from vpns_hf import PromptedSparseModel
from vpns_hf.model.backbones import config_of
from vpns_hf.model.checks import check_handed_over

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def wrap(backbone, **kwargs):
    return PromptedSparseModel.from_backbone(backbone, sparsity=0.0, prompt=None, **kwargs).eval()


def assert_kept_after_saving(model, folder, images=IMAGES):
    expected = model(images).logits
    model.freeze_masks()
    model.save_pretrained(folder)
    torch.testing.assert_close(PromptedSparseModel.from_pretrained(folder).eval()(images).logits, expected)


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("test_resnet", dict(global_pool="max", drop_path_rate=0.2)),
        ("test_resnet", dict(output_stride=8)),
        ("test_resnet", dict(in_chans=1)),
        ("test_convnext", dict(drop_path_rate=0.1)),
        ("test_vit", dict(img_size=32, embed_dim=96)),
        ("test_vit", dict(class_token=False, global_pool="avg")),
    ],
)
def test_timm_objects_keep_the_arguments_that_they_were_created_with(architecture, arguments, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(architecture, num_classes=5, **arguments).eval()
    model = wrap(source)
    size = model.config.image_size
    images = torch.randn(2, arguments.get("in_chans", 3), *size)
    torch.testing.assert_close(model(images).logits, source(images))
    rates = [part.drop_prob for part in source.modules() if type(part).__name__ == "DropPath"]
    assert [part.drop_prob for part in model.modules() if type(part).__name__ == "DropPath"] == rates
    assert_kept_after_saving(model, tmp_path, images)


def test_timm_arguments_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"created with act_layer=.*config\.json cannot hold"):
        wrap(timm.create_model("test_resnet", num_classes=5, act_layer=nn.SiLU))


@pytest.mark.parametrize("change", ["activation", "timm", "epsilon"])
def test_changes_that_only_the_logits_show_are_refused(change):
    torch.manual_seed(0)
    if change == "activation":
        backbone = tiny_backbone("vit")
        backbone.vit.layers[0].mlp.activation_fn = nn.ReLU()
    elif change == "timm":
        backbone = timm.create_model("test_resnet", num_classes=5)
        backbone.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    else:
        backbone = tiny_backbone("swin")
        backbone.swin.layernorm.eps = 10.0
    with pytest.raises(ValueError, match="gives other logits than one that its configuration builds"):
        wrap(backbone)


def cut_neurons(backbone, kept=20):
    up, down = backbone.vit.layers[0].mlp.fc1, backbone.vit.layers[0].mlp.fc2
    chosen = up.weight.abs().sum(1).topk(kept).indices
    up.weight, up.bias = nn.Parameter(up.weight[chosen].detach()), nn.Parameter(up.bias[chosen].detach())
    down.weight = nn.Parameter(down.weight[:, chosen].detach())
    return backbone


@pytest.mark.parametrize("num_labels", [None, 3])
def test_layers_that_were_cut_before_are_kept(num_labels, tmp_path):
    backbone = cut_neurons(tiny_backbone("vit"))
    weight, expected = backbone.vit.layers[0].mlp.fc1.weight.clone(), backbone(IMAGES).logits
    model = wrap(backbone, num_labels=num_labels)
    torch.testing.assert_close(model.backbone_state()["vit.layers.0.mlp.fc1.weight"], weight, rtol=0, atol=0)
    assert model.config.head_parameters == ["classifier.weight", "classifier.bias"]
    if num_labels is None:
        torch.testing.assert_close(model(IMAGES).logits, expected)
    assert_kept_after_saving(model, tmp_path)


def test_channels_that_were_cut_before_are_kept(tmp_path):
    backbone = timm.create_model("test_resnet", num_classes=5).eval()
    block = backbone.layer1[0]
    with torch.no_grad():
        for convolution, dim in ((block.conv1, 0), (block.conv2, 1)):
            convolution.weight = nn.Parameter(convolution.weight.narrow(dim, 0, 3).clone())
        for name in ("weight", "bias"):
            setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name)[:3].clone()))
        block.bn1.running_mean, block.bn1.running_var = block.bn1.running_mean[:3], block.bn1.running_var[:3]
    images = torch.randn(2, 3, 64, 64)
    expected = backbone(images)
    model = wrap(backbone)
    torch.testing.assert_close(model(images).logits, expected)
    assert_kept_after_saving(model, tmp_path, images)


def test_layers_that_were_cut_have_no_stock_export(tmp_path):
    from vpns_hf.export import export_plain

    model = wrap(cut_neurons(tiny_backbone("vit")))
    with pytest.raises(ValueError, match="no stock model builds layers of such sizes"):
        export_plain(model, tmp_path / "plain")


def sequential_head(backbone):
    backbone.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 6))


def head_without_bias(backbone):
    backbone.classifier = nn.Linear(32, 6, bias=False)


def weight_norm(backbone):
    parametrizations.weight_norm(backbone.vit.layers[0].mlp.fc1)


def torch_prune(backbone):
    prune.l1_unstructured(backbone.vit.layers[0].mlp.fc1, "weight", 0.5)


@pytest.mark.parametrize("change", [sequential_head, head_without_bias, weight_norm, torch_prune])
@pytest.mark.parametrize("num_labels", [None, 3])
def test_tensors_that_the_configuration_does_not_build_are_refused(change, num_labels):
    backbone = tiny_backbone("vit")
    change(backbone)
    with pytest.raises(ValueError, match="could not be loaded again after saving"):
        wrap(backbone, num_labels=num_labels)


def test_replaced_heads_need_a_configuration_that_counts_their_classes():
    backbone = tiny_backbone("vit")
    backbone.classifier = nn.Linear(32, 10)
    with pytest.raises(ValueError, match="gives 10 logits, but its configuration counts 6 labels"):
        wrap(backbone)
    backbone.config.num_labels = 10
    model = wrap(backbone)
    assert model(IMAGES).logits.shape == (2, 10)
    assert len(model.config.id2label) == 10


def test_the_check_leaves_the_random_state_and_the_modes_of_modules():
    backbone = tiny_backbone("vit").train()
    backbone.vit.layernorm.eval()
    modes = {part: part.training for part in backbone.modules()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_handed_over(backbone, config_of(backbone), (32, 32))
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    assert {part: part.training for part in backbone.modules()} == modes


def pvt():
    config = PvtConfig(
        image_size=32, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], num_labels=5
    )
    return PvtForImageClassification(config)


@pytest.mark.parametrize(("num_labels", "count"), [(None, 5), (3, 3)])
def test_pvt_counts_labels_in_a_field_of_its_own(num_labels, count):
    model = wrap(pvt(), num_labels=num_labels)
    assert model(IMAGES).logits.shape == (2, count)
    assert model.config.num_labels == model.config.backbone_config.num_labels == count


def test_pruned_models_are_no_backbones(tmp_path):
    model = tiny_model("vit")
    model.freeze_masks()
    model.save_pretrained(tmp_path)
    for backbone in (str(tmp_path), model):
        with pytest.raises(ValueError, match=r"is a pruned model already.*merge_and_unload"):
            wrap(backbone, num_labels=3)
    assert wrap(model.merge_and_unload(), num_labels=3)(IMAGES).logits.shape == (2, 3)


def test_loading_with_another_number_of_labels_is_refused(tmp_path):
    model = tiny_model("vit")
    model.freeze_masks()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_labels` is 3, but `id2label` names 6 classes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    model.config.num_labels = 3
    with pytest.raises(ValueError, match="counts 3 labels, but the head has 6 classes"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("ids", [(1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 6), (-1, 0, 1, 2, 3, 4)])
def test_class_ids_count_from_zero_without_gaps(ids):
    with pytest.raises(ValueError, match="expected each number from 0 to 5 once"):
        wrap(tiny_backbone("vit"), id2label={index: f"class {index}" for index in ids})


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("arguments", [{}, dict(global_pool="max", in_chans=1)])
def test_folders_that_timm_wrote(arguments, safe, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=5, **arguments).eval()
    save_for_hf(source, tmp_path, safe_serialization=safe)
    images = torch.randn(2, arguments.get("in_chans", 3), 160, 160)
    model = wrap(str(tmp_path))
    torch.testing.assert_close(model(images).logits, source(images))
    assert_kept_after_saving(model, tmp_path / "pruned", images)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "cache_dir"])
def test_timm_folders_that_open_other_files_are_refused(argument, tmp_path):
    save_for_hf(timm.create_model("test_resnet", num_classes=5), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"][argument] = "/etc/hostname"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"passes '{argument}' to `timm.create_model`"):
        wrap(str(tmp_path))


VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SiglipForImageClassification(SiglipConfig(vision_config=VISION)),
        lambda: CLIPForImageClassification(CLIPConfig(vision_config=VISION, projection_dim=16)),
    ],
)
def test_image_sizes_in_a_vision_configuration(build, tmp_path):
    backbone = build().eval()
    assert wrap(copy.deepcopy(backbone)).config.image_size == [32, 32]
    images = torch.randn(2, 3, 64, 64)
    model = wrap(copy.deepcopy(backbone), image_size=64)
    expected = backbone(pixel_values=images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(model(images).logits, expected)
    assert_kept_after_saving(model, tmp_path, images)


def test_attentions_and_hidden_states():
    backbone = tiny_backbone("vit")
    backbone.set_attn_implementation("eager")
    expected = backbone(IMAGES, output_attentions=True, output_hidden_states=True)
    model = wrap(backbone)
    output = model(IMAGES, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.attentions, expected.attentions)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states)
    assert model(IMAGES).hidden_states is None
    model.config.output_hidden_states = True
    torch.testing.assert_close(model(IMAGES).hidden_states, expected.hidden_states)
    assert model(IMAGES, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("family", ["vit", "resnet", "timm_resnet"])
def test_attentions_that_the_backbone_does_not_return_are_refused(family):
    with pytest.raises((ValueError, TypeError), match="attentions"):
        tiny_model(family)(IMAGES, output_attentions=True)


def test_pointers_of_git_lfs_are_named(tmp_path):
    tiny_backbone("vit").save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises((ValueError, OSError), match="git lfs pull"):
        wrap(str(tmp_path))


def test_layers_that_were_frozen_by_hand_are_refused():
    backbone = tiny_backbone("vit")
    backbone.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match=r"4 parameters of this ViT.*requires_grad_\(True\)"):
        PromptedSparseModel.from_backbone(backbone, prompt=None)
    PromptedSparseModel.from_backbone(backbone.requires_grad_(True), prompt=None)


def test_parameters_that_a_class_freezes_itself_are_accepted(monkeypatch):
    init = ViTForImageClassification.__init__

    def frozen_positions(self, config):
        init(self, config)
        self.vit.embeddings.position_embeddings.requires_grad_(False)

    monkeypatch.setattr(ViTForImageClassification, "__init__", frozen_positions)
    PromptedSparseModel.from_backbone(tiny_backbone("vit"), prompt=None)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("vit", dict(num_hidden_layers=10**6)),
        ("vit", dict(num_hidden_layers=10**9)),
        ("vit", dict(hidden_size=12_000)),
        ("vit", dict(intermediate_size=10**6)),
        ("vit", dict(image_size=10**5)),
        ("resnet", dict(hidden_sizes=[8, 10**6])),
        ("resnet", dict(depths=[1, 10**6])),
        ("vit", dict(num_labels=10**8)),
        ("timm_resnet", dict(num_classes=10**8)),
    ],
)
def test_folders_whose_configuration_is_larger_than_their_weights_are_refused(family, change, tmp_path):
    tiny_backbone(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = peak_memory()
    with pytest.raises(ValueError, match=r"describes a model of more than|is too large for an image classifier"):
        PromptedSparseModel.from_backbone(str(tmp_path))
    assert peak_memory() - before < 2**27


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessor_config.json", "{", "no sound JSON"),
        (
            "preprocessor_config.json",
            '{"image_processor_type": "ViTImageProcessor", "image_std": [0, 1, 1]}',
            "above 0",
        ),
        ("preprocessor_config.json", '{"size": {"height": 1000000, "width": 3}}', "at most 4096"),
        ("config.json", '{"model_type": "vit", "num_hidden_layers": "two"}', "num_hidden_layers"),
        ("config.json", '{"model_type": "vit", "model_type": ["vit"]}', "no local folder"),
        ("config.json", "[" * 5000, "no sound JSON"),
    ],
)
def test_damaged_files_of_a_backbone_are_refused_in_one_sentence(name, content, message, tmp_path):
    tiny_backbone("vit").save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        PromptedSparseModel.from_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


def peak_memory():
    """Largest size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
