"""SparseGPT: closed forms, exact counts, and outputs closer than those of magnitude pruning."""

import copy

import pytest
import torch
from helpers.models import tiny_backbone, tiny_model
from helpers.states import assert_same_fingerprint, fingerprint, in_state, make_batches
from torch import nn

from vpns_hf.masking import kept_count, select_masks
from vpns_hf.scores import score_weights
from vpns_hf.scores.sparsegpt import prune_matrix, sparsegpt

DOUBLE = torch.float64


def problem(rows=5, columns=12, groups=1, samples=200):
    """A weight and the Hessian of strongly correlated inputs."""
    mixing = torch.randn(groups, columns, columns, dtype=DOUBLE) + 2
    inputs = torch.randn(groups, samples, columns, dtype=DOUBLE) @ mixing
    return torch.randn(groups, rows, columns, dtype=DOUBLE), inputs, 2 / samples * inputs.mT @ inputs


def reconstruction_error(inputs, weight, pruned):
    return float((inputs @ (weight - pruned).mT).square().sum())


def test_optimal_brain_surgeon_vector():
    """H = [[2, 1], [1, 2]], w = (1, 2): removing the first weight gives (0, 2.5) at a loss of .75."""
    hessian = torch.tensor([[[2.0, 1], [1, 2]]], dtype=DOUBLE)
    weight = torch.tensor([[[1.0, 2]]], dtype=DOUBLE)
    mask, pruned = prune_matrix(weight, hessian, 0.5, damping=0)
    assert mask.tolist() == [[[False, True]]]
    torch.testing.assert_close(pruned, torch.tensor([[[0, 2.5]]], dtype=DOUBLE))
    change = (pruned - weight)[0, 0]
    loss = change @ hessian[0] @ change / 2
    assert loss.item() == pytest.approx(0.75)
    assert loss.item() == pytest.approx((1 / (2 * torch.linalg.inv(hessian[0])[0, 0])).item())


def test_errors_only_move_to_later_columns():
    """Removing the second of (2, 1) leaves (2, 0), although (2.5, 0) would be closer."""
    hessian = torch.tensor([[[2.0, 1], [1, 2]]], dtype=DOUBLE)
    mask, pruned = prune_matrix(torch.tensor([[[2.0, 1]]], dtype=DOUBLE), hessian, 0.5, damping=0)
    assert mask.tolist() == [[[True, False]]]
    assert pruned.tolist() == [[[2, 0]]]


@pytest.mark.parametrize("block_size", [1, 3, 4, 128])
def test_columns_after_the_last_removed_one_are_least_squares_optimal(block_size):
    """Given everything up to the last removed column of a row, what follows it is the least-squares solution."""
    weight, inputs, hessian = problem()
    mask, pruned = prune_matrix(weight, hessian, 0.4, block_size, damping=0)
    assert int(mask.sum()) == kept_count(60, 0.4)
    checked = 0
    for row in range(5):
        last = int((~mask[0, row]).nonzero().max())
        target = inputs[0] @ weight[0, row] - inputs[0, :, : last + 1] @ pruned[0, row, : last + 1]
        if last + 1 < 12:
            best = torch.linalg.lstsq(inputs[0, :, last + 1 :], target).solution
            torch.testing.assert_close(pruned[0, row, last + 1 :], best)
            checked += 1
    assert checked


def test_first_columns_removed_is_the_least_squares_solution():
    weight, inputs, hessian = problem()
    weight[:, :, :4] *= 1e-6
    mask, pruned = prune_matrix(weight, hessian, 1 / 3, damping=0)
    assert not mask[:, :, :4].any()
    assert mask[:, :, 4:].all()
    best = torch.linalg.lstsq(inputs[0, :, 4:], inputs[0] @ weight[0].T).solution.T
    torch.testing.assert_close(pruned[0, :, 4:], best)


@pytest.mark.parametrize("block_size", [1, 5, 7, 128])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.77, 0.99, 1])
def test_counts_are_exact(sparsity, block_size):
    weight, _, hessian = problem(rows=3, columns=17, groups=2)
    mask, pruned = prune_matrix(weight, hessian, sparsity, block_size)
    assert int(mask.sum()) == kept_count(weight.numel(), sparsity)
    assert not pruned[~mask].any()
    for start in range(0, 17, block_size):
        part = mask[:, :, start : start + block_size]
        assert abs(int(part.sum()) - (1 - sparsity) * part.numel()) <= 2
    if sparsity == 0:
        torch.testing.assert_close(pruned, weight)


def test_blocks_give_the_same_weights_for_the_same_mask():
    """Passing errors on block by block is only a faster way to pass them on column by column."""
    weight, _, hessian = problem()
    weight[:, :, ::3] *= 1e-6
    # Four of twelve columns are removed, one of every three, so blocks of three choose as one block does.
    found = [prune_matrix(weight, hessian, 1 / 3, block_size) for block_size in (3, 6, 12)]
    for mask, pruned in found:
        assert torch.equal(mask, found[0][0])
        torch.testing.assert_close(pruned, found[0][1])


def test_groups_are_separate_problems():
    weight, _, hessian = problem(groups=3)
    weight[:, :, :6] *= 1e-6
    mask, pruned = prune_matrix(weight, hessian, 0.5)
    for group in range(3):
        alone = prune_matrix(weight[group : group + 1], hessian[group : group + 1], 0.5)
        assert torch.equal(mask[group], alone[0][0])
        torch.testing.assert_close(pruned[group], alone[1][0])


def test_inputs_that_are_always_zero_lose_their_weights_first():
    weight, inputs, _ = problem()
    inputs[:, :, 5] = 0
    weight[:, :, 5] = 100
    mask, pruned = prune_matrix(weight, 2 / 200 * inputs.mT @ inputs, 0.4)
    assert not mask[:, :, 5].any()
    assert not pruned[:, :, 5].any()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_outputs_are_closer_than_those_of_magnitude_pruning(sparsity):
    weight, inputs, hessian = problem(rows=20, columns=40, samples=400)
    _, pruned = prune_matrix(weight, hessian, sparsity, block_size=8)
    magnitude = weight * select_masks({"a": weight.abs()}, sparsity)["a"]
    assert reconstruction_error(inputs, weight, pruned) < 0.7 * reconstruction_error(inputs, weight, magnitude)


@pytest.mark.parametrize("state", ["dense", "search", "frozen"])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_model_is_left_as_it_is_and_every_layer_counts_exactly(family, state):
    model, batches = in_state(state, family), make_batches()
    before = fingerprint(model)
    masks, weights = sparsegpt(model, batches, 0.6)
    assert_same_fingerprint(before, fingerprint(model))
    assert list(masks) == list(weights) == list(model.masks())
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == kept_count(mask.numel(), 0.6)
        assert weights[name].shape == mask.shape
        assert not weights[name].requires_grad
        assert not weights[name][~mask].any()


@pytest.mark.parametrize("family", ["mobilenet_v2", "convnext", "swin", "timm_vit", "timm_resnet"])
def test_families(family):
    masks, weights = sparsegpt(tiny_model(family), make_batches(1), 0.5)
    for name, mask in masks.items():
        assert int(mask.sum()) == kept_count(mask.numel(), 0.5)
        assert weights[name].isfinite().all()


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_logits_are_closer_than_those_of_magnitude_pruning(family):
    backbone, batches = tiny_backbone(family), make_batches(4, 16)
    images = torch.cat([batch["pixel_values"] for batch in batches])
    masks, weights = sparsegpt(tiny_model(copy.deepcopy(backbone)), batches, 0.5)
    magnitude = select_masks(score_weights("magnitude", tiny_model(copy.deepcopy(backbone)), []), 0.5, "layer")
    with torch.no_grad():
        expected = backbone(images).logits
        errors = {}
        for kind in ("sparsegpt", "magnitude"):
            pruned = copy.deepcopy(backbone)
            for name in masks:
                weight = pruned.get_parameter(name)
                weight.copy_(weights[name] if kind == "sparsegpt" else weight * magnitude[name])
            errors[kind] = float((pruned(images).logits - expected).square().sum())
    assert errors["sparsegpt"] < errors["magnitude"]


def test_each_layer_sees_the_inputs_of_pruned_layers():
    """The Hessian of a layer is that of its inputs with exactly the layers before it pruned."""
    backbone, batches = tiny_backbone("resnet"), make_batches(2, 20)
    model = tiny_model(copy.deepcopy(backbone))
    masks, weights = sparsegpt(model, batches, 0.5, block_size=4)
    head = backbone.classifier[1]
    dense_head = head.weight.detach().clone()
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.shape != dense_head.shape:
                backbone.get_parameter(name).copy_(weight)
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            backbone(batch["pixel_values"])
    inputs = torch.cat(seen)
    hessian = 2 / len(inputs) * inputs.T @ inputs
    mask, pruned = prune_matrix(dense_head.double()[None], hessian[None], 0.5, block_size=4)
    name = next(name for name, weight in weights.items() if weight.shape == dense_head.shape)
    assert torch.equal(masks[name], mask[0])
    torch.testing.assert_close(weights[name].double(), pruned[0], rtol=1e-4, atol=1e-6)


def test_half_precision_models_get_half_precision_weights():
    model = tiny_model(tiny_backbone("vit").bfloat16())
    masks, weights = sparsegpt(model, make_batches(), 0.5)
    for name, weight in model.prunable_weights().items():
        assert weights[name].dtype == weight.dtype == torch.bfloat16
        assert int(masks[name].sum()) == kept_count(weight.numel(), 0.5)


def test_errors():
    model, batches = tiny_model("resnet"), make_batches()
    with pytest.raises(ValueError, match="fraction in"):
        sparsegpt(model, batches, 1.5)
    with pytest.raises(ValueError, match="'sparsegpt' needs at least one batch"):
        sparsegpt(model, [], 0.5)
    with pytest.raises(ValueError, match=r"Hessian of the inputs of .* cannot be inverted"):
        sparsegpt(model, make_batches(1, 1), 0.5, damping=0)
    model.detach_scores()
    model.backbone.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"inputs of spare\.weight .* `ignore_modules`"):
        sparsegpt(model, batches, 0.5)
