"""Find prunable weights and read them in any state of the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

MASK_SUFFIX = "_mask"


class PrunableWeight(NamedTuple):
    """A prunable weight by its owner and its name there: `getattr(module, tensor_name)`."""

    module: nn.Module
    tensor_name: str


_MULTIHEAD_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        # The projection of queries, keys and values is a bare parameter here, a linear layer everywhere else.
        return tuple(name for name in _MULTIHEAD_WEIGHTS if getattr(module, name) is not None)
    return ()


def find_prunable_weights(
    backbone: nn.Module, ignore_modules: Iterable[str] = (), skip: Iterable[str] = ()
) -> dict[str, PrunableWeight]:
    """Find the weights of linear and convolution layers, in module order.

    Biases, norms, tokens and position embeddings are never prunable.

    Args:
        backbone: a model in any state.
        ignore_modules: module names, whole (`"vit.layers.0.mlp"`) or their end (`"patch_embed.proj"`), left out with
            all below them.
        skip: weight names to leave out.

    Raises:
        ValueError: an entry of `ignore_modules` names no module, or two modules share one prunable weight.
    """
    modules = {name: module for name, module in backbone.named_modules() if "parametrizations" not in name.split(".")}
    ignored = {name for entry in ignore_modules for name in _matching_modules(entry, modules)}
    prunables, owners = {}, dict[int, str]()
    for name, module in modules.items():
        if any(name == entry or name.startswith(f"{entry}.") for entry in ignored):
            continue
        for tensor_name in _weight_names(module):
            full_name, prunable = f"{name}.{tensor_name}".lstrip("."), PrunableWeight(module, tensor_name)
            if full_name in set(skip):
                continue
            if (owner := owners.setdefault(id(stored_weight(prunable)), full_name)) != full_name:
                raise ValueError(
                    f"{owner} and {full_name} share one weight, which cannot be masked twice; list one in "
                    "`ignore_modules`."
                )
            prunables[full_name] = prunable
    return prunables


def _matching_modules(entry: str, modules: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name in modules if name and (name == entry or name.endswith(f".{entry}"))]
    if not found:
        raise ValueError(
            f"`ignore_modules` names {entry!r}, which is no module of the backbone, such as {max(modules, key=len)!r}."
        )
    return found


def stored_weight(prunable: PrunableWeight) -> Tensor:
    """Return the parameter that stores a weight, whether or not it is parametrized."""
    if parametrize.is_parametrized(prunable.module, prunable.tensor_name):
        return parametrizations(prunable).original
    return prunable.module.get_parameter(prunable.tensor_name)


def all_kept(prunables: Mapping[str, PrunableWeight]) -> dict[str, Tensor]:
    """Return masks that keep every weight."""
    return {name: torch.ones_like(stored_weight(prunable), dtype=torch.bool) for name, prunable in prunables.items()}


def parametrizations(prunable: PrunableWeight) -> parametrize.ParametrizationList:
    """Return the parametrizations of a masked weight."""
    by_tensor = cast(nn.ModuleDict, prunable.module.parametrizations)
    return cast(parametrize.ParametrizationList, by_tensor[prunable.tensor_name])


def scores_name(weight: str) -> str:
    """Return the name in the search state of the learned scores of a weight."""
    module, _, tensor = weight.rpartition(".")
    return f"{module}.parametrizations.{tensor}.0.scores".lstrip(".")


def dense_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their names in the dense backbone, without scores and masks."""
    state = {}
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if name.endswith((".0.scores", ".0.mask")) and "parametrizations" in name.split("."):
            continue
        state[name.replace("parametrizations.", "").removesuffix(".original")] = tensor
    masks = {name + MASK_SUFFIX for name in state}
    return {name: tensor for name, tensor in state.items() if name not in masks}
