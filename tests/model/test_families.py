"""Every supported family goes through the whole life of a subnetwork."""

import copy

import pytest
import torch
from helpers.models import CONFIGS, tiny_backbone, tiny_model
from transformers import AutoModelForImageClassification

from vpns_hf import PromptedSparseModel

IMAGES, LABELS = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])


def assert_close(actual, expected):
    """Equal up to rounding: kernels choose another order of summation for weights at another address."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


def dense_state(model):
    """The backbone's parameters under their dense names."""
    return {
        name.replace(".parametrizations", "").removesuffix(".original"): parameter.detach().clone()
        for name, parameter in model.backbone.named_parameters()
        if not name.endswith(".scores")
    }


def step(model, optimizer):
    optimizer.zero_grad()
    model(IMAGES, labels=LABELS, use_prompt=True).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("family", CONFIGS)
def test_life_of_a_subnetwork(family, tmp_path):
    backbone = tiny_backbone(family)
    pretrained = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    wrapped = tiny_model(backbone)
    assert wrapped.config.state == "search"
    assert all(int(mask.sum()) == round(0.5 * mask.numel()) for mask in wrapped.masks().values())
    assert set(wrapped.scores()) == set(wrapped.masks()) <= set(pretrained)

    wrapped.train()
    before = {name: score.detach().clone() for name, score in wrapped.scores().items()}
    step(wrapped, torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2))
    wrapped.update_masks()
    assert all(torch.equal(value, pretrained[name]) for name, value in dense_state(wrapped).items())
    assert any(not torch.equal(score, before[name]) for name, score in wrapped.scores().items())
    assert wrapped.prompt.top.abs().max() > 0

    wrapped.eval()
    searched = wrapped(IMAGES, use_prompt=True).logits
    _roundtrip(wrapped, tmp_path / "search")
    wrapped.freeze_masks()
    assert_close(wrapped(IMAGES, use_prompt=True).logits, searched)
    masks = {name: mask.clone() for name, mask in wrapped.masks().items()}

    wrapped.train()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2)
    step(wrapped, optimizer), step(wrapped, optimizer)
    weights = dense_state(wrapped)
    assert all(torch.equal(mask, masks[name]) for name, mask in wrapped.masks().items())
    assert all((weights[name][~mask] == 0).all() for name, mask in masks.items())
    assert any(not torch.equal(weights[name], pretrained[name] * mask) for name, mask in masks.items())
    wrapped.eval()
    _roundtrip(wrapped, tmp_path / "frozen")


def _roundtrip(model, folder):
    model.save_pretrained(folder)
    for loader in (PromptedSparseModel, AutoModelForImageClassification):
        loaded = loader.from_pretrained(folder)
        assert type(loaded) is PromptedSparseModel
        assert loaded.config.state == model.config.state
        for use_prompt in (False, True):
            assert_close(loaded(IMAGES, use_prompt=use_prompt).logits, model(IMAGES, use_prompt=use_prompt).logits)
        state = model.state_dict()
        assert set(state) == set(loaded.state_dict())
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    "family", [family if family == "resnet" else pytest.param(family, marks=pytest.mark.slow) for family in CONFIGS]
)
def test_compiled_forward_is_equal(family):
    searched, frozen = tiny_model(family), tiny_model(family)
    frozen.freeze_masks()
    for model, use_prompt in ((searched, True), (frozen, False)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            expected = model(IMAGES, use_prompt=use_prompt).logits
            assert_close(compiled(IMAGES, use_prompt=use_prompt).logits, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_new_head_is_never_pruned(family):
    model = tiny_model(family, num_labels=3)
    head = set(model.config.head_parameters)
    assert model.config.new_head
    assert head
    assert not head & set(model.masks())
    assert model(IMAGES).logits.shape == (4, 3)
    assert {name.removeprefix("backbone.") for name in model.parameters_by_role()["head"]} == head


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_model_is_plain_and_equal(family, tmp_path):
    model = tiny_model(family)
    model.freeze_masks()
    expected, kind = model(IMAGES).logits, type(model.backbone)
    plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain) is kind
    assert torch.equal(plain(IMAGES).logits, expected)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert_close(loaded(IMAGES).logits, expected)
