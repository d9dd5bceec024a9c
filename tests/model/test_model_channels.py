"""Models with pruned channels: masked, cut, saved, loaded, exported and plain models give the same logits."""

import copy
import json
import sys

import pytest
import torch
from helpers.models import CONFIGS, tiny_backbone, tiny_model
from helpers.states import assert_same_state
from transformers import AutoModelForImageClassification

from vpns_hf import PromptedSparseConfig, PromptedSparseModel
from vpns_hf.export import export_onnx, export_plain
from vpns_hf.masking import kept_count
from vpns_hf.masking.channels import Channels

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def channels(family="vit", **kwargs):
    torch.manual_seed(0)
    return tiny_model(family, **{"pattern": "channels", "sparsity": 0.5} | kwargs)


def frozen(family="vit", **kwargs):
    model = channels(family, **kwargs)
    with torch.no_grad():
        for score in model.scores().values():
            score.copy_(torch.rand_like(score))
    model.update_masks()
    model.freeze_masks()
    return model


def cut(family="vit", **kwargs):
    model = frozen(family, **kwargs)
    model.remove_channels()
    return model


def logits(model):
    with torch.no_grad():
        return model(IMAGES).logits


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def size(model):
    return sum(parameter.numel() for parameter in model.backbone.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_masked_frozen_cut_loaded_and_plain_models_are_equal(family, tmp_path):
    model = channels(family)
    with torch.no_grad():
        for score in model.scores().values():
            score.copy_(torch.rand_like(score))
    model.update_masks()
    masks, searched = model.masks(), logits(model)
    model.freeze_masks()
    assert_equal(logits(model), searched)
    assert all(torch.equal(mask, masks[name]) for name, mask in model.masks().items())
    widths = model.pattern.widths(model.pattern.kept(masks))
    assert all(widths[group.name] == max(1, kept_count(group.size, 0.5)) for group in model.pattern.groups)
    before, expected = size(model), logits(model)
    model.remove_channels()
    assert size(model) < before
    assert (model.config.state, model.sparsity) == ("frozen", 0)
    assert [group.size for group in model.pattern.groups] == list(widths.values())
    assert_equal(logits(model), expected)
    for packed in (True, False):
        model.save_pretrained(tmp_path / str(packed), packed=packed)
        loaded = PromptedSparseModel.from_pretrained(tmp_path / str(packed))
        assert_same_state(loaded, model)
        assert loaded.pattern.groups == model.pattern.groups
        assert_equal(logits(loaded), logits(model))
    plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain) is type(tiny_backbone(family))
    assert_equal(plain(pixel_values=IMAGES).logits, logits(model))


@pytest.mark.parametrize("family", ["vit", "deit", "swin", "timm_vit", "resnet", "mobilenet_v2"])
def test_a_cut_model_learns_and_is_pruned_again(family):
    model = cut(family)
    model.train()
    model(IMAGES, labels=torch.tensor([0, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    model.eval()
    model.apply_masks({name: torch.ones_like(mask) for name, mask in model.masks().items()})
    kept = {group.name: torch.arange(group.size) < (group.size + 1) // 2 for group in model.pattern.groups}
    model.apply_masks(model.pattern.expanded(kept, model.prunable_weights()))
    expected = logits(model)
    model.remove_channels()
    assert [group.size for group in model.pattern.groups] == [int(flags.sum()) for flags in kept.values()]
    assert_equal(logits(model), expected)


@pytest.mark.parametrize(
    ("family", "field"), [("vit", "intermediate_size"), ("deit", "intermediate_size"), ("dinov2", "mlp_ratio")]
)
def test_mlps_of_one_width_come_out_as_a_stock_model(family, field, tmp_path):
    model = cut(family, ignore_modules=["attention"])
    expected = logits(model)
    export_plain(model, tmp_path / "plain")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert "tensor_shapes" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert getattr(stock.config, field) == getattr(tiny_backbone(family).config, field) / 2
    with torch.no_grad():
        assert_equal(stock(pixel_values=IMAGES).logits, expected)


def test_other_widths_are_no_stock_model(tmp_path):
    with pytest.raises(ValueError, match="were cut, and no stock model builds layers of such sizes"):
        export_plain(cut(), tmp_path / "plain")


@pytest.mark.parametrize("family", ["vit", "timm_vit", "resnet"])
def test_a_cut_model_as_onnx(family, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = cut(family)
    export_onnx(model, tmp_path / "model.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"pixel_values": IMAGES.numpy()})
    assert_equal(torch.from_numpy(found), logits(model))


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_search_is_saved_and_its_scores_learn(family, tmp_path):
    model = channels(family, scope="global")
    assert set(model.scores()) < set(model.masks())
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert all(torch.equal(mask, loaded.masks()[name]) for name, mask in model.masks().items())
    model.train()(IMAGES, labels=torch.tensor([0, 1])).loss.backward()
    for name, score in model.scores().items():
        # Pruned channels, too, so that they can come back.
        assert score.grad.count_nonzero() > score.numel() // 2, name


def test_the_score_of_a_channel_gets_the_gradient_of_its_gate():
    """Computed again by a gate of ones on the neurons of the first MLP."""
    model = channels(sparsity=0.0)
    reader = "vit.layers.0.mlp.fc2.weight"
    labels = torch.tensor([0, 1])
    model(IMAGES, labels=labels).loss.backward()
    plain = copy.deepcopy(model)
    plain.detach_scores()
    gate = torch.ones(64, requires_grad=True)
    plain.backbone.vit.layers[0].mlp.fc2.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    plain(IMAGES, labels=labels).loss.backward()
    torch.testing.assert_close(model.scores()[reader].grad, gate.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", ["parameters", "macs"])
@pytest.mark.parametrize("family", ["vit", "resnet", "timm_vit"])
def test_budgets_are_shares_of_the_whole_model(family, unit):
    model = channels(family, budget=f"{unit}:0.3", scope="global", sparsity=None)
    assert (model.config.channel_budget, model.config.sparsity) == (unit, 0.3)
    model.freeze_masks()
    dense = tiny_model(family, sparsity=0.0, scope="global")
    model.remove_channels()

    def left(model):
        if unit == "parameters":
            return size(model)
        return sum(layer.macs for layer in dense_report(model).layers)

    assert 0.2 < left(model) / left(dense) <= 0.7
    assert model.pattern.cost({group.name: group.size for group in model.pattern.groups}) == left(model)


def dense_report(model):
    """Multiply-accumulates of every layer."""
    wrapped = PromptedSparseModel.from_backbone(
        copy.deepcopy(model).merge_and_unload(), sparsity=0.0, image_size=32, prompt=None
    )
    return wrapped.sparsity_report()


def test_widths_are_multiples():
    model = channels("resnet", channel_multiple=4, scope="global")
    widths = model.pattern.widths(model.pattern.kept(model.masks()))
    assert all(width % 4 == 0 for width in widths.values())
    heads = channels("vit", channel_multiple=8, scope="global")
    widths = heads.pattern.widths(heads.pattern.kept(heads.masks()))
    assert all(width * 16 % 8 == 0 for name, width in widths.items() if "attention" in name)
    assert all(width % 8 == 0 for name, width in widths.items() if "mlp" in name)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(budget="flops:0.5", sparsity=None), "`budget` is 'flops:0.5'; expected 'channels', 'parameters' or"),
        (dict(budget="macs:2", sparsity=None), "`budget` is 'macs:2'; expected"),
        (dict(budget="macs:x", sparsity=None), "`budget` is 'macs:x'; expected"),
        (dict(budget="macs:0.5", sparsity=0.4), "`budget` is 'macs:0.5' and `sparsity` 0.4; pass the share"),
        (
            dict(budget="macs:0.99", sparsity=None, scope="global"),
            "at most 0.* can be removed while every layer keeps",
        ),
        (dict(budget="macs", pattern="unstructured"), "are of `pattern='channels'` alone"),
        (dict(scope="erk"), "'channels'` ranks channels"),
        (dict(ignore_modules=["mlp", "attention"]), "No channels of this ViTForImageClassification can be removed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        channels(**settings)


def test_removal_needs_frozen_channels(tmp_path):
    with pytest.raises(ValueError, match="Cannot remove channels: the model is in the 'search' state"):
        channels().remove_channels()
    model = tiny_model()
    model.freeze_masks()
    with pytest.raises(ValueError, match=r"Only whole channels can be removed.*pattern 'unstructured'"):
        model.remove_channels()
    model = frozen()
    masks = {name: torch.zeros_like(mask) if ".0.mlp" in name else mask for name, mask in model.masks().items()}
    model.apply_masks(masks)
    with pytest.raises(ValueError, match=r"No channel of vit.layers.0.mlp.fc1.weight is kept"):
        model.remove_channels()
    model = frozen()
    torch.nn.init.ones_(model.backbone.vit.layers[0].mlp.fc2.weight)
    with pytest.raises(ValueError, match="not zero although the mask prunes them"):
        model.remove_channels()


def test_what_cannot_be_proven_is_refused(monkeypatch):
    """A statistic over the neurons of an MLP, which the graph does not see."""

    class Centred(torch.nn.GELU):
        def forward(self, values):
            return super().forward(values) - values.detach().mean(-1, keepdim=True)

    backbone = tiny_backbone("vit")
    from vpns_hf.masking.channel_graph import find_channel_groups
    from vpns_hf.model.channel_removal import prove_removal

    names = [f"vit.layers.{layer}.mlp.{part}.weight" for layer in (0, 1) for part in ("fc1", "fc2")]
    for layer in backbone.vit.layers:
        layer.mlp.activation_fn = Centred()
        torch.nn.init.normal_(layer.mlp.fc1.weight)
        torch.nn.init.normal_(layer.mlp.fc2.weight)
    groups = find_channel_groups(
        backbone, IMAGES[:1], lambda model, images: model(pixel_values=images).logits, names, ["classifier"]
    )
    with pytest.raises(
        ValueError, match=r"cannot be removed, because a model without them does not equal.*ignore_mod"
    ):
        prove_removal(backbone, Channels(groups), (32, 32))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r'needs Torch-Pruning: `pip install "vpns-hf\[channels\]"`'):
        channels()


def test_a_cut_model_loads_without_torch_pruning(tmp_path, monkeypatch):
    model = cut()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda groups: groups[0][1][0].__setitem__(0, "vit.nowhere"),
        lambda groups: groups[0].__setitem__(0, 65),
        lambda groups: groups[0][1][0].__setitem__(2, 1),
        lambda groups: groups[0][1].pop(),
        lambda groups: groups[0][1].reverse(),
        lambda groups: groups.append(groups[0]),
    ],
)
def test_damaged_groups_are_refused(damage, tmp_path):
    frozen().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    damage(config["channel_groups"])
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"`channel_groups` does not fit .* of the backbone; the configuration is dam"
    ):
        PromptedSparseModel.from_pretrained(tmp_path)


def test_large_shapes_are_refused_before_memory_is_taken(tmp_path):
    cut(ignore_modules=["mlp"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    shapes = config["backbone_config"]["tensor_shapes"]
    assert shapes["vit.layers.0.attention.q_proj.weight"] == [16, 32]
    shapes["vit.layers.0.attention.q_proj.weight"] = [2**20, 2**20]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"entries, and the weight files hold .* they do not belong together"):
        PromptedSparseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("final", ["search", "frozen"])
def test_a_label_mapping_slices_the_head_that_reads_channels(final):
    model = channels("resnet", num_labels=3, label_mapping="frequency")
    assert "classifier.1.weight" in model.scores()
    if final == "frozen":
        model.freeze_masks()
    model.set_label_mapping([5, 0, 2])
    if final == "search":
        model.freeze_masks()
    expected = logits(model)
    model.remove_channels()
    assert_equal(logits(model), expected)
    assert expected.shape == (2, 3)


def test_a_new_head_is_not_cut():
    model = channels("resnet", num_labels=3)
    assert not set(model.config.head_parameters) & set(model.masks())
    head = model.backbone.classifier[1].weight.shape
    model.freeze_masks()
    model.remove_channels()
    assert model.backbone.classifier[1].weight.shape == head


def test_a_subnetwork_of_channels_is_taken_over(tmp_path):
    shared = frozen(num_labels=6)
    shared.save_pretrained(tmp_path)
    model = channels(num_labels=3)
    model.load_subnetwork(tmp_path)
    assert all(torch.equal(mask, shared.masks()[name]) for name, mask in model.masks().items())


def test_the_configuration_comes_back_from_json():
    config = cut("timm_vit").config
    again = PromptedSparseConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
