"""Masked weights are not kept for the backward pass, and no gradient changes by it."""

from contextlib import nullcontext

import pytest
import torch
from helpers.models import CONFIGS, tiny_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from vpns_hf import masking
from vpns_hf.masking import search
from vpns_hf.masking.recomputation import can_recompute, recomputing
from vpns_hf.model import modeling


def gradients(model, images):
    model.zero_grad()
    model(images, labels=torch.arange(len(images)), use_prompt=True).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_kept_weights(family, monkeypatch):
    torch.manual_seed(0)
    model, images = tiny_model(family).train(), torch.randn(4, 3, 32, 32)
    # BatchNorm and dropout must see both passes alike.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    recomputed = gradients(model, images)
    model.load_state_dict(state)
    monkeypatch.setattr(modeling, "recomputing", nullcontext)
    torch.manual_seed(1)
    kept = gradients(model, images)
    assert recomputed.keys() == kept.keys() != set()
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


@pytest.mark.parametrize("family", ["vit", "swin", "resnet", "timm_vit"])
def test_masked_weights_live_only_within_their_layer(family, monkeypatch):
    stored = []

    def watch(tensor, *how):
        stored.append(StorageWeakRef(tensor.untyped_storage()))
        can_recompute(tensor, *how)

    monkeypatch.setattr(search, "can_recompute", watch)
    model, images = tiny_model(family).train(), torch.randn(2, 3, 32, 32)
    output = model(images, use_prompt=True)
    assert len(stored) >= len(model.masks())
    assert all(storage.expired() for storage in stored)
    output.logits.sum().backward()

    stored.clear()
    monkeypatch.setattr(modeling, "recomputing", nullcontext)
    output = model(images, use_prompt=True)
    assert sum(not storage.expired() for storage in stored) == len(model.masks())


def test_a_changed_mask_is_noticed_in_the_backward_pass():
    model = tiny_model("vit").train()
    loss = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
    with torch.no_grad():
        next(iter(model.masks().values())).logical_not_()
    with pytest.raises(RuntimeError, match="only after `backward`"):
        loss.backward()


def test_checkpointed_blocks_keep_nothing():
    """Hooks that are set within take over, so that activation checkpointing saves what it saves elsewhere."""
    lengths = []

    def block(x, weight):
        result = x
        for _ in range(3):
            result = torch.tanh(result @ weight)
            lengths.append(StorageWeakRef(result.untyped_storage()))
        return result

    weight = torch.randn(8, 8, requires_grad=True)
    with recomputing():
        output = checkpoint(block, torch.randn(4, 8), weight, use_reentrant=False).sin()
    assert [storage.expired() for storage in lengths] == [True, True, False]
    output.sum().backward()
    assert weight.grad is not None


def test_hooks_set_around_the_model_see_every_tensor(monkeypatch):
    """Those of `save_on_cpu`, say, or of a checkpoint of the whole model."""
    model, images, seen = tiny_model("vit").train(), torch.randn(2, 3, 32, 32), []
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.shape) or tensor, lambda x: x):
            model(images, use_prompt=True)
        monkeypatch.setattr(modeling, "recomputing", nullcontext)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


def test_layers_used_twice_and_several_weights_of_one_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            x = self.linear(torch.tanh(self.linear(x)))
            output, attended = self.attention(x, x, x, need_weights=True)
            return output.sum() + attended.square().sum()

    model, x, found = Shared(), torch.randn(2, 3, 6), []
    prunables = masking.find_prunable_weights(model)
    masking.attach_scores(prunables)
    masking.update_masks(prunables, 0.5, "layer")
    for context in (recomputing, nullcontext):
        with context():
            output = model(x)
        found.append(torch.autograd.grad(output, list(model.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_tensor_that_was_changed_is_kept():
    weight, x = torch.randn(3, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    with recomputing():
        doubled = 2 * weight
        can_recompute(doubled, lambda weight: 2 * weight, weight)
        doubled.mul_(3)
        output = x @ doubled
    output.sum().backward()
    assert torch.allclose(x.grad, 6 * weight.detach().sum(1).expand(2, 3))


def test_tensors_without_memory_are_kept():
    """Sparse ones have no storage, those of the meta device all have the same address."""
    weight, x = torch.randn(3, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    with recomputing():
        doubled = 2 * weight
        can_recompute(doubled, lambda weight: 2 * weight, weight)
        output = torch.sparse.mm(torch.eye(3).to_sparse(), x @ doubled)
    output.sum().backward()
    assert torch.equal(x.grad, (2 * weight.detach()).sum(1).expand(3, 3))

    weight, index = torch.empty(3, 3, device="meta", requires_grad=True), torch.empty(3, dtype=int, device="meta")
    with recomputing():
        can_recompute(2 * weight, lambda weight: 2 * weight, weight)
        output = weight.index_select(0, index)
    assert output.grad_fn._saved_index.dtype == torch.int64


def test_what_was_told_is_forgotten_outside():
    weight, mask = torch.randn(4, 4, requires_grad=True), torch.rand(4, 4) < 0.5
    with recomputing():
        pass
    product = weight * mask
    can_recompute(product, lambda *_: torch.zeros(4, 4), weight, mask)
    (product * product).sum().backward()
    assert torch.equal(weight.grad, 2 * weight.detach() * mask)


def test_only_the_tensor_itself_is_made_again():
    """Wrong values are given on purpose, so that it shows which tensor came from them."""
    weight, other = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    with recomputing():
        doubled = 2 * weight
        can_recompute(doubled, lambda _: torch.full((3, 3), 7.0), weight)
        transposed, unrelated = doubled.t() @ torch.ones(3, 3), other * other
        (transposed * transposed).sum().backward(retain_graph=True)
        product = (doubled * other).sum()
    product.backward()
    # d(doubled * other) / d(other) reads what doubled is made of again; d / d(weight) reads `other`, which was kept.
    assert torch.equal(other.grad, torch.full((3, 3), 7.0))
    unrelated.sum().backward()
    assert torch.allclose(other.grad, 7 + 2 * other.detach())
