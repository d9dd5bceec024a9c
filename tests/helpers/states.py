"""Compare models bit for bit."""

import random

import numpy as np
import torch

from .models import tiny_model


def assert_same_state(model, other):
    """Same names, plain tensors of the same dtypes on the same devices, equal bit for bit."""
    state, expected = model.state_dict(), other.state_dict()
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert type(tensor) is torch.Tensor
        assert (tensor.dtype, tensor.device) == (expected[name].dtype, expected[name].device), name
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def make_batches(count=2, size=3, classes=6):
    return [
        {"pixel_values": torch.randn(size, 3, 32, 32), "labels": torch.randint(0, classes, (size,)), "id": "ignored"}
        for _ in range(count)
    ]


def in_state(state, family="vit", **kwargs):
    model = tiny_model(family, **kwargs)
    if state == "dense":
        model.detach_scores()
    elif state == "frozen":
        model.freeze_masks()
    return model


def fingerprint(model):
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grad": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "config": model.config.to_dict(),
        "rng": [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def assert_same_fingerprint(before, after):
    for key in ("training", "requires_grad", "config", "rng", "hooks"):
        assert before[key] == after[key], key
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for name, grad in before["grad"].items():
        assert (grad is None and after["grad"][name] is None) or torch.equal(grad, after["grad"][name]), name
