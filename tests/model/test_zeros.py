"""Pruned positions are zero, whichever way a state comes in; sparsity is measured; scores keep their precision."""

import copy
import pickle

import pytest
import torch
from helpers.models import tiny_backbone, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from vpns_hf import PromptedSparseModel

IMAGES, LABELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), torch.tensor([0, 1])
NAME = "vit.layers.0.mlp.fc1.weight"


@pytest.fixture
def frozen():
    model = tiny_model("vit")
    model.freeze_masks()
    return model


def dense_state(model):
    return {
        name: torch.ones_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def holds_zeros(model):
    weights = model.prunable_weights()
    return all(not weights[name][~mask].any() for name, mask in model.masks().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("with_masks", [False, True])
def test_dense_states_are_refused_and_nothing_is_loaded(frozen, assign, with_masks):
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    state = {name: t for name, t in dense_state(frozen).items() if with_masks or not name.endswith("_mask")}
    with pytest.raises(ValueError, match="are not zero although the mask prunes them"):
        frozen.load_state_dict(state, strict=with_masks, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_states_stay_sparse_in_training(frozen, assign):
    other = tiny_model("vit", scope="global")
    other.freeze_masks()
    frozen.load_state_dict({name: t.clone() for name, t in other.state_dict().items()}, assign=assign)
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=0.1)
    for _ in range(2):
        frozen(IMAGES, labels=LABELS).loss.backward()
        optimizer.step()
    assert holds_zeros(frozen)
    assert torch.equal(frozen.masks()[NAME], other.masks()[NAME])
    assert not torch.equal(frozen.prunable_weights()[NAME], other.prunable_weights()[NAME])


def test_gradients_are_masked_by_one_hook_however_often_states_are_loaded(frozen):
    for _ in range(3):
        frozen.load_state_dict(frozen.state_dict())
    assert len(frozen.prunable_weights()[NAME]._backward_hooks) == 1


def test_raw_folders_with_masks_over_dense_weights_are_refused(frozen, tmp_path):
    frozen.save_pretrained(tmp_path, packed=False)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: torch.ones_like(t) if t.is_floating_point() else t for name, t in state.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="are not zero although the mask prunes them"):
        PromptedSparseModel.from_pretrained(tmp_path)


def test_merging_refuses_weights_that_are_not_zero_any_more(frozen):
    # As merging a LoRA does.
    with torch.no_grad():
        frozen.prunable_weights()[NAME].add_(1)
    with pytest.raises(ValueError, match=rf"of {NAME} are not zero .* call `zero_masked_weights\(\)`"):
        frozen.merge_and_unload()
    frozen.zero_masked_weights()
    assert not frozen.merge_and_unload().state_dict()[NAME].all()


def test_masks_of_other_types_are_refused():
    model = tiny_model("vit")
    masks = {name: mask.float() for name, mask in model.masks().items()}
    with pytest.raises(ValueError, match="convert it to bool, True where"):
        model.apply_masks(masks)


def test_sparsity_counts_zeros_and_not_masks(frozen):
    pruned = {name: int((~mask).sum()) for name, mask in frozen.masks().items()}
    total = sum(mask.numel() for mask in frozen.masks().values())
    assert frozen.sparsity == pytest.approx(sum(pruned.values()) / total)
    with torch.no_grad():
        frozen.prunable_weights()[NAME].add_(10)
    pruned[NAME] = 0
    assert frozen.sparsity == pytest.approx(sum(pruned.values()) / total)
    report = {layer.name: layer for layer in frozen.sparsity_report().layers}
    assert report[NAME].kept == report[NAME].total


def test_layers_that_were_added_after_freezing_are_named(frozen):
    layer = frozen.backbone.vit.layers[0].mlp
    layer.adapter = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"adapter\.weight has no mask, so its layer was added or replaced"):
        _ = frozen.sparsity


def test_models_whose_layers_were_all_replaced_measure_no_sparsity(frozen):
    for module in list(frozen.backbone.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, nn.Conv2d)):
                setattr(module, name, nn.Identity())
    with pytest.raises(ValueError, match="no prunable weight, so no sparsity can be measured"):
        _ = frozen.sparsity


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
@pytest.mark.parametrize("prompt", ["pad", "lowrank"])
def test_scores_and_prompts_keep_their_precision(cast, prompt):
    model = tiny_model("vit", prompt=prompt)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.add_(1 / 3)
    learned = [*model.scores().values(), *model.prompt.parameters()]
    before = [parameter.detach().clone() for parameter in learned]
    cast(model)
    assert model.backbone.classifier.bias.dtype != torch.float32
    for parameter, old in zip([*model.scores().values(), *model.prompt.parameters()], before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=0)
    dtype = model.backbone.classifier.bias.dtype
    model.train()(IMAGES.to(dtype), labels=LABELS, use_prompt=True).loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.scores().values())


@pytest.mark.parametrize("rename", ["before", "after", "loaded"])
def test_both_configurations_have_the_labels_that_were_renamed(rename, tmp_path):
    names = {index: f"animal {index}" for index in range(6)}
    model = tiny_model("vit")
    if rename == "before":
        model.config.id2label = names
    model.freeze_masks()
    if rename == "after":
        model.config.id2label = names
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    if rename == "loaded":
        loaded.config.id2label = names
    else:
        assert loaded.config.backbone_config.id2label == names
    plain = loaded.merge_and_unload()
    assert plain.config.id2label == names
    assert plain.config.label2id == {name: index for index, name in names.items()}


def test_source_heads_keep_the_source_labels(tmp_path):
    backbone = tiny_backbone("vit")
    source = dict(backbone.config.id2label)
    model = tiny_model(backbone, label_mapping="frequency", id2label={0: "cat", 1: "dog"}, keep_source_head=True)
    model.set_label_mapping([4, 2])
    model.freeze_masks()
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert loaded.merge_and_unload().config.id2label == source


@pytest.mark.parametrize("part", ["backbone", "backbone.vit", "backbone.vit.layers.0.mlp.fc1"])
@pytest.mark.parametrize("assign", [False, True])
def test_dense_states_are_refused_by_every_part_of_a_model(frozen, part, assign):
    module = frozen.get_submodule(part)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    dense = {name: tensor for name, tensor in dense_state(module).items() if not name.endswith("_mask")}
    with pytest.raises(ValueError, match="are not zero although the mask prunes them; multiply the weights"):
        module.load_state_dict(dense, strict=False, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


def test_parts_that_were_assigned_stay_sparse_in_training(frozen):
    state = {name: tensor.clone() for name, tensor in frozen.backbone.state_dict().items()}
    frozen.backbone.load_state_dict(state, assign=True)
    optimizer = torch.optim.AdamW(frozen.parameters(), lr=0.1)
    frozen(IMAGES, labels=LABELS).loss.backward()
    optimizer.step()
    assert holds_zeros(frozen)
    assert len(frozen.prunable_weights()[NAME]._backward_hooks) == 1


def test_parts_take_any_state_once_nothing_is_masked(frozen):
    copied = copy.deepcopy(frozen)
    plain = copied.merge_and_unload()
    plain.load_state_dict({name: torch.ones_like(tensor) for name, tensor in plain.state_dict().items()})
    assert plain.state_dict()[NAME].all()
    searching = tiny_model("vit")
    searching.backbone.load_state_dict(searching.backbone.state_dict())
    with pytest.raises(ValueError, match="are not zero"):
        copy.deepcopy(frozen).backbone.load_state_dict(
            {NAME: torch.ones_like(frozen.prunable_weights()[NAME])}, strict=False
        )


def test_models_can_be_pickled(frozen):
    assert holds_zeros(pickle.loads(pickle.dumps(frozen)))


def test_functions_that_are_applied_leave_the_zeros(frozen):
    def initialize(module):
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)

    frozen.apply(initialize)
    assert holds_zeros(frozen)
    assert frozen.prunable_weights()[NAME].any()


@pytest.mark.parametrize("packed", [False, True])
def test_models_whose_zeros_were_lost_are_not_saved(frozen, packed, tmp_path):
    with torch.no_grad():
        frozen.prunable_weights()[NAME].add_(1)
    with pytest.raises(ValueError, match=rf"of {NAME} are not zero .* call `zero_masked_weights\(\)`"):
        frozen.save_pretrained(tmp_path / "new", packed=packed)
    assert not (tmp_path / "new").exists()
