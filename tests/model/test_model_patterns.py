"""Models pruned in patterns: counts, files, transfer, label mappings, and what is refused before work starts."""

import json
import logging

import pytest
import torch
from helpers.models import CONFIGS, tiny_model
from helpers.states import assert_same_state
from safetensors.torch import load_file, save_file
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForImageClassification, ViTConfig

from vpns_hf import PromptedSparseConfig, PromptedSparseModel
from vpns_hf.cli.inspection import inspect_folder
from vpns_hf.inference import semi_structured_layers, to_semi_structured
from vpns_hf.masking import get_pattern, kept_count

PATTERNS = ["2:4", "1:4", "block:4", "block:32"]
PATCHES = "vit.embeddings.patch_embeddings.projection.weight"


def patterned(pattern, backbone="vit", **kwargs):
    """A tiny model; blocks at half of them, n:m at the sparsity that it fixes."""
    torch.manual_seed(0)
    sparsity = 0.5 if pattern.startswith("block") else None
    return tiny_model(backbone, pattern=pattern, sparsity=sparsity, **{"scope": "global"} | kwargs)


def frozen(pattern, backbone="vit", **kwargs):
    model = patterned(pattern, backbone, **kwargs)
    model.freeze_masks()
    return model


def wide_backbone():
    """Wide enough for the kernels of sparse tensor cores."""
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_exact_counts(family, pattern):
    model = patterned(pattern, family)
    masks, weights, own = model.masks(), model.prunable_weights(), get_pattern(pattern)
    assert all(own.follows(mask) and mask.shape == weights[name].shape for name, mask in masks.items())
    if own.sparsity is not None:
        assert model.sparsity == model.config.sparsity == own.sparsity
        assert all(weight.shape[1] % own.group == 0 for weight in weights.values())
        assert all(model.backbone.get_parameter(name).shape[1] % own.group for name in model.unpatterned_weights())
    else:
        assert model.unpatterned_weights() == []
        groups = {name: own.sum(mask) > 0 for name, mask in masks.items()}
        total = sum(kept.numel() for kept in groups.values())
        assert sum(int(kept.sum()) for kept in groups.values()) == kept_count(total, 0.5)
        assert all(score.shape == groups[name].shape for name, score in model.scores().items())
    model.freeze_masks()
    weights = model.prunable_weights()
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())


def test_weights_that_do_not_take_the_pattern_are_named_and_not_counted(caplog):
    with caplog.at_level(logging.WARNING):
        model = patterned("2:4")
    assert model.unpatterned_weights() == [PATCHES]
    assert "do not take the pattern 2:4, and do not count in the sparsity: " + PATCHES in caplog.text
    model.freeze_masks()
    report = model.sparsity_report()
    assert (report.pattern, report.sparsity) == ("2:4", 0.5)
    assert PATCHES not in [layer.name for layer in report.layers]
    zeros = sum(int((weight == 0).sum()) for weight in model.prunable_weights().values())
    assert report.sparsity_of_all_parameters == zeros / report.parameters
    assert json.loads(report.to_json())["pattern"] == "2:4"
    assert (model.backbone.get_parameter(PATCHES) != 0).all()
    assert "pattern `2:4` make the file small" in model.short_card("me/model").text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(pattern="2:4", sparsity=0.9), r"`sparsity` is 0.9, but `pattern='2:4'` fixes it at 0.5; pass that or"),
        (dict(pattern="2:4", scope="erk"), "'erk'.*gives all the same"),
        (dict(pattern="diagonal"), "'unstructured', n:m such as '2:4'"),
        (dict(pattern="3:7"), "has no prunable weight.*takes the pattern '3:7'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        tiny_model("vit", **dict(sparsity=None, scope="global") | settings)


def test_sparsity_may_rise_to_that_of_the_pattern_and_not_above():
    model = patterned("2:4")
    for sparsity in (0.0, 0.2, 0.5):
        model.set_sparsity(sparsity)
        total = sum(mask.numel() for mask in model.masks().values())
        assert sum(int(mask.sum()) for mask in model.masks().values()) == kept_count(total, sparsity)
        assert all(model.pattern.follows(mask) for mask in model.masks().values())
    with pytest.raises(ValueError, match=r"removes at most 0\.5"):
        model.set_sparsity(0.6)
    assert model.config.sparsity == 0.5


def test_a_configuration_contradicts_no_pattern():
    with pytest.raises(ValueError, match=r"removes at most 0\.5"):
        PromptedSparseConfig(pattern="2:4", sparsity=0.9)
    with pytest.raises(ValueError, match="`pattern` is 4; expected a name"):
        PromptedSparseConfig(pattern=4)
    older = {name: value for name, value in PromptedSparseConfig().to_dict().items() if name != "pattern"}
    assert PromptedSparseConfig.from_dict(older).pattern == "unstructured"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_saved_models_come_back(family, pattern, tmp_path):
    model = patterned(pattern, family)
    with torch.no_grad():
        for score in model.scores().values():
            score.add_(torch.rand_like(score))
    model.update_masks()
    model.save_pretrained(tmp_path / "search")
    assert_same_state(PromptedSparseModel.from_pretrained(tmp_path / "search"), model)
    model.freeze_masks()
    model.save_pretrained(tmp_path / "frozen")
    loaded = PromptedSparseModel.from_pretrained(tmp_path / "frozen")
    assert_same_state(loaded, model)
    assert loaded.config.pattern == pattern
    found = inspect_folder(tmp_path / "frozen")
    assert (found.pattern, found.sparsity) == (pattern, model.sparsity)
    assert inspect_folder(tmp_path / "search").pattern == pattern


def test_a_packed_mask_of_two_in_four_takes_two_thirds_of_a_bit(tmp_path):
    """There are six ways to keep 2 of 4: log2(6) / 4 = 0.65 bits a weight, where any half takes one bit."""
    frozen("2:4", wide_backbone()).save_pretrained(tmp_path)
    layer = max(inspect_folder(tmp_path).layers, key=lambda layer: layer.total)
    assert 8 * (layer.bytes - 4 * layer.kept) / layer.total < 0.7


@pytest.mark.parametrize("pattern", ["2:4", "block:4"])
def test_a_file_whose_mask_lacks_the_pattern_is_refused(pattern, tmp_path):
    frozen(pattern).save_pretrained(tmp_path, packed=False)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if key.endswith("_mask") and state[key].any()).removesuffix("_mask")
    kept = state[f"{name}_mask"].flatten().nonzero()[0]
    state[f"{name}_mask"].view(-1)[kept] = False
    state[name].view(-1)[kept] = 0
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not have the pattern '{pattern}'.*is damaged"):
        PromptedSparseModel.from_pretrained(tmp_path)


def test_masks_found_elsewhere_must_have_the_pattern():
    model, other = patterned("2:4"), patterned("1:4")
    with pytest.raises(ValueError, match="does not have the pattern '2:4'; build the model with the pattern"):
        model.apply_masks(other.masks())
    assert model.config.state == "search"
    model.apply_masks({name: torch.ones_like(mask) for name, mask in model.masks().items()})
    assert model.sparsity == 0


def test_a_subnetwork_keeps_its_pattern(tmp_path):
    shared = frozen("2:4")
    shared.save_pretrained(tmp_path)
    model = patterned("2:4", num_labels=3, new_head=True)
    model.load_subnetwork(tmp_path)
    assert all(torch.equal(mask, shared.masks()[name]) for name, mask in model.masks().items())
    with pytest.raises(
        ValueError, match=r"have the pattern '2:4'.*build it with `from_backbone\(..., pattern='2:4'\)"
    ):
        patterned("block:4").load_subnetwork(tmp_path)


@pytest.mark.parametrize("pattern", ["2:4", "block:4"])
def test_a_label_mapping_slices_scores_and_masks(pattern):
    model = patterned(pattern, num_labels=3, label_mapping="frequency")
    name, rows = "classifier.weight", torch.tensor([5, 0, 2])
    before = {key: score.detach().clone() for key, score in model.scores().items()}
    weight = model.prunable_weights()[name].detach().clone()
    model.set_label_mapping(rows)
    after = {key: score.detach() for key, score in model.scores().items()}
    assert torch.equal(model.prunable_weights()[name], weight[rows])
    assert torch.equal(after[name], model.pattern.take_rows(before[name], weight.shape, rows))
    assert all(torch.equal(after[key], before[key]) for key in before if key != name)
    assert all(model.pattern.follows(mask) for mask in model.masks().values())


def test_a_label_mapping_does_not_cut_through_frozen_blocks():
    model = frozen("block:4", num_labels=3, label_mapping="frequency")
    with pytest.raises(ValueError, match="would cut through them in the head; set it before"):
        model.set_label_mapping([5, 0, 2])
    rows = frozen("2:4", num_labels=3, label_mapping="frequency")
    rows.set_label_mapping([5, 0, 2])
    assert rows.sparsity == 0.5


@pytest.mark.parametrize("pattern", ["2:4", "block:4"])
def test_signed_scores_start_at_zero_in_groups(pattern):
    model = patterned(pattern)
    shapes = {name: score.shape for name, score in model.scores().items()}
    model.detach_scores()
    model.attach_scores(signed=True)
    assert {name: score.shape for name, score in model.scores().items()} == shapes
    assert not any(score.any() for score in model.scores().values())


# 2:4 on a GPU --------------------------------------------------------------------------------------------------------


def test_masks_have_the_layout_that_is_compressed():
    """torch's compression for sparse tensor cores, and back, without loss; it drops what is no 2:4."""
    model = frozen("2:4", wide_backbone()).to(torch.bfloat16)
    layers = semi_structured_layers(model)
    assert len(layers) == 12
    assert "classifier" not in layers
    for layer in layers.values():
        compressed, meta = sparse_semi_structured_from_dense_cutlass(layer.weight.detach())
        assert compressed.shape == (layer.out_features, layer.in_features // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(compressed, meta), layer.weight)


def test_what_sparse_tensor_cores_do_not_take():
    with pytest.raises(ValueError, match="in the 'search' state with the pattern '1:4'; prune one"):
        to_semi_structured(patterned("1:4", wide_backbone()))
    with pytest.raises(ValueError, match=r"compute capability 8.0 or newer, and this model is on cpu"):
        to_semi_structured(frozen("2:4", wide_backbone()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_on_sparse_tensor_cores(dtype):
    model = frozen("2:4", wide_backbone()).cuda().to(dtype)
    images = torch.randn(8, 3, 32, 32, device="cuda", dtype=dtype)
    fast = to_semi_structured(model)
    first = fast.backbone.get_submodule(next(iter(semi_structured_layers(model))))
    assert isinstance(first.weight, torch.sparse.SparseSemiStructuredTensor)
    with torch.no_grad():
        torch.testing.assert_close(fast(images).logits, model(images).logits, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        to_semi_structured(model.float())
