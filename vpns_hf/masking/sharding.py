"""Tensors that FSDP2 (`torch.distributed.fsdp.fully_shard`) has split over processes.

The only module that knows `DTensor`. Parameters are split along their first dimension; masks are split like their
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from .sharded_topk import Shards


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether the tensors are sharded over processes.

    Raises:
        ValueError: some are and some are not.
    """
    sharded = {isinstance(tensor, DTensor) for tensor in tensors}
    if len(sharded) > 1:
        raise ValueError(
            "Some weights are sharded and some are not, so their scores cannot be ranked together; shard the whole "
            "model with `fully_shard(model)`."
        )
    return True in sharded


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, sharing its memory; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a whole tensor like another of its shape; every process passes the same values."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def arranged_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard or gather a tensor like another of its shape; all processes call this together."""
    return split_like(tensor, other) if isinstance(other, DTensor) else whole(tensor)


def join_like(part: Tensor, other: Tensor) -> Tensor:
    """Build the tensor whose local shard is `part`, sharded like another of its shape."""
    if not isinstance(other, DTensor):
        return part
    return DTensor.from_local(
        part, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


def shards_of(tensors: Iterable[Tensor]) -> Shards:
    """Return the processes that hold the parts of sharded tensors.

    Raises:
        ValueError: they are not all split once, along their first dimension, over the same processes.
    """
    layouts = {(tensor.device_mesh, tuple(tensor.placements)) for tensor in tensors if isinstance(tensor, DTensor)}
    mesh, placements = layouts.pop()
    split = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    whole_on = [placement for placement in placements if placement == Replicate()]
    if layouts or len(split) != 1 or len(split) + len(whole_on) != len(placements):
        raise ValueError(
            f"Weights are placed as {placements}; masks can be selected of weights that are all split once, along "
            "their first dimension, over the same processes, as `fully_shard` does it by default."
        )
    group = mesh.get_group(split[0])

    def total(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=group)
        return tensor

    return Shards(dist.get_rank(group), dist.get_world_size(group), total)


def count_true(masks: Iterable[Tensor]) -> int:
    """Count the True entries of bool tensors over all processes."""
    masks = list(masks)
    counted = torch.stack([local(mask).count_nonzero() for mask in masks]).sum()
    return int(shards_of(masks).sum(counted) if is_sharded(masks) else counted)


def full_state(model: nn.Module, on_every_process: bool = False) -> dict[str, Tensor]:
    """Gather the state dictionary of a sharded model, tensor by tensor; all processes call this together.

    Args:
        model: any module, sharded or not.
        on_every_process: whether every process gets it, on its device. Otherwise the first process gets it on the
            CPU, and the others an empty one.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=not on_every_process)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


@torch.no_grad()
def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a whole state dictionary, which every process has, into a model that may be sharded.

    Raises:
        RuntimeError: names or shapes differ.
    """
    own = model.state_dict()
    model.load_state_dict({name: split_like(tensor, own[name]) for name, tensor in state.items()})


def forget(model: nn.Module) -> None:
    """Clear a module and the state that torch keeps about sharding it."""
    model.__dict__.clear()
    # torch shards a module only once and has no public function that undoes it.
    _composable_state._module_state_mapping.pop(model, None)
