"""Find the channels of a model that can be removed together, with Torch-Pruning's dependency graph (arXiv 2301.12900).

The graph finds which layers share channels; attention heads, whose queries, keys, values and outputs go together, are
found from the modules. Torch-Pruning neither cuts nor loads anything here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .channels import ChannelGroup, ChannelSlices

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# All else that holds parameters takes statistics over channels, as LayerNorm does, or is no layer that could be cut.
_LAYERS = (nn.Linear, *_CONVOLUTIONS, nn.modules.batchnorm._BatchNorm)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_BIAS_TABLE = "relative_position_bias.relative_position_bias_table"
# Products of two activations, in names of the graph; the channels of attention are heads.
_PRODUCTS = ("Bmm", "Baddbmm", "DotProduct")


def find_channel_groups(
    model: nn.Module,
    example: Tensor,
    forward: Callable[[nn.Module, Tensor], Tensor],
    prunable: Collection[str],
    outputs: Collection[str],
) -> tuple[ChannelGroup, ...]:
    """Find the groups of channels of a dense model whose weights are all prunable.

    Left out are channels of a residual stream with LayerNorm, which takes statistics over them, and those that are
    concatenated with others.

    Args:
        model: dense model; not modified.
        example: images, [n, channels, height, width].
        forward: function of model and images that returns the logits.
        prunable: names of the weights that may be pruned.
        outputs: names of the modules whose output is the logits.

    Raises:
        ImportError: Torch-Pruning is not installed.
        ValueError: Torch-Pruning fails on the model.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            f'`pattern="channels"` needs Torch-Pruning: `pip install "vpns-hf[channels]"` ({error}).'
        ) from error
    heads = list(_attention_heads(model))
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            # It warns of parameters outside layers; groups with such are left out.
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(traced, example, forward)
            found = list(
                graph.get_all_groups(
                    ignored_layers=[traced.get_submodule(name) for name in outputs],
                    root_module_types=[*_CONVOLUTIONS, nn.Linear],
                )
            )
    except (RuntimeError, ValueError, AssertionError, AttributeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"Torch-Pruning finds no channels in {type(model).__name__} ({type(error).__name__}: {reason}); choose "
            "another pattern."
        ) from error
    names = {id(module): name for name, module in traced.named_modules()}
    tensors = set(dict(traced.named_parameters())) | set(dict(traced.named_buffers()))
    in_heads = {part.tensor for group in heads for part in group.weights}
    groups = [group for item in found if (group := _group(item, graph, names, tensors, in_heads)) is not None]
    wanted = [group for group in (*groups, *heads) if {part.tensor for part in group.weights} <= set(prunable)]
    # The first weight, which writes the channels, names the group.
    return tuple({group.name: group for group in wanted if group.readers and group.weights[0].dim == 0}.values())


def _group(
    found: Any, graph: Any, names: Mapping[int, str], tensors: Collection[str], in_heads: Collection[str]
) -> ChannelGroup | None:
    """Translate a group of Torch-Pruning; None where it is no group of channels that stand each for itself."""
    size, weights, others = len(found[0].idxs), list[ChannelSlices](), list[ChannelSlices]()
    for item in found:
        node, module = item.dep.target, item.dep.target.module
        if isinstance(module, nn.Parameter) or any(product in node.name for product in _PRODUCTS):
            return None
        if id(module) not in names:
            continue
        name, place = names[id(module)], _slices(item, size)
        depthwise = isinstance(module, _CONVOLUTIONS) and module.groups > 1
        if not isinstance(module, _LAYERS) or (depthwise and module.groups != module.in_channels):
            return None
        if place is None or f"{name}.weight" in in_heads:
            return None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            others += _existing(tensors, name, ("weight", "bias", "running_mean", "running_var"), place)
        elif depthwise or not graph.is_in_channel_pruning_fn(item.dep.handler):
            # A depthwise convolution writes what it reads.
            weights += _existing(tensors, name, ("weight",), place)
            others += _existing(tensors, name, ("bias",), place)
        elif place != (0, module.weight.shape[1] // size):
            return None
        else:
            weights.append(ChannelSlices(f"{name}.weight", 1, *place))
    weights.sort(key=lambda part: part.dim)
    return ChannelGroup(size, tuple(dict.fromkeys(weights)), tuple(dict.fromkeys(others)))


def _existing(
    tensors: Collection[str], layer: str, keys: tuple[str, ...], place: tuple[int, int]
) -> list[ChannelSlices]:
    names = (f"{layer}.{key}" for key in keys)
    return [ChannelSlices(name, 0, *place) for name in names if name in tensors]


def _slices(item: Any, size: int) -> tuple[int, int] | None:
    """Return offset and width of the slices of all channels; None where they do not follow each other in order."""
    indices, channels = list(item.idxs), list(item.root_idxs)
    width, rest = divmod(len(indices), size)
    if rest or indices != list(range(indices[0], indices[0] + len(indices))):
        return None
    return (indices[0], width) if channels == [index // width for index in range(len(indices))] else None


def _attention_heads(model: nn.Module) -> Iterator[ChannelGroup]:
    """Find the heads of all attention layers with separate or fused projections."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if all(isinstance(children.get(child), nn.Linear) for child in _PROJECTIONS):
            *read, out = (f"{name}.{child}" for child in _PROJECTIONS)
            yield _heads(model, [(layer, 0) for layer in read], out, module.head_dim, f"{name}.{_BIAS_TABLE}")
        elif is_timm_attention(module):
            rows = module.qkv.out_features // 3
            places = [(f"{name}.qkv", part * rows) for part in range(3)]
            yield _heads(model, places, f"{name}.proj", module.head_dim)


def is_timm_attention(module: nn.Module) -> bool:
    """Return whether a module is timm's attention with fused projections, no gate, and no norm over its output."""
    if type(module).__module__ != "timm.layers.attention" or type(module).__name__ != "Attention":
        return False
    return isinstance(module.norm, nn.Identity) and module.gate is None


def _heads(
    model: nn.Module, places: list[tuple[str, int]], out: str, width: int, table: str | None = None
) -> ChannelGroup:
    """Describe the heads of one attention layer.

    Args:
        model: the model.
        places: layers of queries, keys and values, and the first row of each.
        out: layer that reads the heads.
        width: size of a head.
        table: name of a parameter with a column for each head, where there is one.
    """
    tensors = dict(model.named_parameters())
    size = tensors[f"{out}.weight"].shape[1] // width
    weights = [ChannelSlices(f"{layer}.weight", 0, offset, width) for layer, offset in places]
    others = [ChannelSlices(f"{layer}.bias", 0, row, width) for layer, row in places if f"{layer}.bias" in tensors]
    if table in tensors:
        others.append(ChannelSlices(str(table), 1, 0, 1))
    return ChannelGroup(size, (*weights, ChannelSlices(f"{out}.weight", 1, 0, width)), tuple(others))
