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
    """Whether the tensors are split over processes.

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
    """The part of a tensor that this process holds, sharing its memory; all of it where it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where it is split; all processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor split as another of its shape is; every process passes the same values."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def arranged_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor, split or not, brought into the form of another of its shape; all processes call it together."""
    return split_like(tensor, other) if isinstance(other, DTensor) else whole(tensor)


def join_like(part: Tensor, other: Tensor) -> Tensor:
    """The tensor of which this process holds `part`, split as another of its shape is."""
    if not isinstance(other, DTensor):
        return part
    return DTensor.from_local(
        part, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


def shards_of(tensors: Iterable[Tensor]) -> Shards:
    """The processes that hold the parts of sharded tensors.

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
    """How many entries of bool tensors are True, over all processes."""
    masks = list(masks)
    counted = torch.stack([local(mask).count_nonzero() for mask in masks]).sum()
    return int(shards_of(masks).sum(counted) if is_sharded(masks) else counted)


def full_state(model: nn.Module, on_every_process: bool = False) -> dict[str, Tensor]:
    """The state dictionary of a sharded model, gathered tensor by tensor; all processes call it together.

    Args:
        model: any module, sharded or not.
        on_every_process: give it to every process, on its device; else to the first one, in the memory of the CPU,
            and an empty one to the others.
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
    """Drop everything that a module holds, and what torch remembers of sharding it, so that it can be filled anew."""
    model.__dict__.clear()
    # torch shards a module once in its life and has no public way to undo it.
    _composable_state._module_state_mapping.pop(model, None)
