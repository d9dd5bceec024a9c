"""BatchNorm in evaluation mode, multiplied into the convolution before it."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fold_batchnorms(model: nn.Module, example: Tensor) -> int:
    """Fold every BatchNorm whose input is the output of a convolution into it, and return how many there were.

    Pruned weights stay zero. That nothing else reads the output of such a convolution is for the caller to check, by
    comparing what the model gives.

    Args:
        model: in evaluation mode; run once.
        example: its input.
    """
    pairs = _pairs(model, example)
    names = {id(module): name for name, module in model.named_modules()}
    for norm, conv in pairs:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        model.set_submodule(names[id(norm)], nn.Identity())
    return len(pairs)


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[nn.BatchNorm2d, nn.Conv2d]]:
    """Every BatchNorm with the convolution that it follows; both are called once."""
    outputs: dict[int, tuple[weakref.ref[Tensor], nn.Conv2d]] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    calls = Counter[nn.Module]()

    def remember(conv: nn.Conv2d, args: Any, output: Tensor) -> None:
        outputs[id(output)] = weakref.ref(output), conv
        calls[conv] += 1

    def look_up(norm: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        reference, conv = outputs.get(id(args[0]), (None, None))
        # The number of a tensor that is gone may be given to another.
        if reference is not None and conv is not None and reference() is args[0]:
            pairs[norm] = conv

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(remember))
        elif type(module).forward is nn.BatchNorm2d.forward and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(look_up))
    model(example)
    for handle in handles:
        handle.remove()
    return [(norm, conv) for norm, conv in pairs.items() if calls[norm] == calls[conv] == 1]
