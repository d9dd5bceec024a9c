"""Compare scores, masks, prompts and weights of all processes by hashes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..masking import sharding
from ..model.modeling import PromptedSparseModel

_CHUNK = 1 << 20
# The golden ratio in 64 bits, as a signed number: its odd multiples spread over all of them.
_SPREAD = -0x61C8864680B583EB


class ConsistencyCheck(TrainerCallback):
    """Compare the processes before the first step of a stage, after every few steps, and after the last one.

    Args:
        accelerator: accelerator of the trainer.
        steps: optimizer steps between two comparisons.
    """

    def __init__(self, accelerator: Accelerator, steps: int):
        self.accelerator, self.steps = accelerator, steps

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        self._check(state, kwargs["model"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: D102
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            self._check(state, kwargs["model"])

    def _check(self, state: TrainerState, model: PromptedSparseModel) -> None:
        compare_processes(self.accelerator, model, f"after step {state.global_step}")


def compare_processes(accelerator: Accelerator, model: PromptedSparseModel, when: str) -> None:
    """Raise on every process unless all hold the same; all call it together.

    Sharded tensors are left out: there is one copy of each.

    Args:
        model: unwrapped model.
        when: time of the comparison, for the error.

    Raises:
        RuntimeError: names what differs, and where.
    """
    kinds: dict[str, Iterable[Tensor]] = {
        "masks": model.masks().values(),
        **{role: parameters.values() for role, parameters in model.parameters_by_role().items()},
    }
    own = torch.stack([hash_tensors(tensors, accelerator.device) for tensors in kinds.values()])
    everyone = accelerator.gather(own[None])
    differs = everyone != everyone[0]
    if not differs.any():
        return
    names = [name for name, column in zip(kinds, differs.T.tolist(), strict=True) if any(column)]
    processes = [str(index) for index, row in enumerate(differs.tolist()) if any(row)]
    raise RuntimeError(
        f"The processes hold different {' and '.join(names)} {when}: process {', '.join(processes)} against process 0."
        " Look for code that changes the model on some processes only, or draws without the common seed, then "
        "resume from the last checkpoint with `resume_from_checkpoint=True`."
    )


def hash_tensors(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return a 64-bit hash of the bits of several tensors; sharded ones are left out."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        if not sharding.is_sharded([tensor]):
            total = total * 31 + hash_tensor(tensor)
    return total


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> Tensor:
    """Compute a 64-bit hash of the bits of a tensor and where they stand in row-major order, on its device.

    Eight bytes at a time are mixed and multiplied by an odd number of their position, and summed modulo 2 ** 64.

    Returns:
        int64, no dimensions.
    """
    stored = tensor.detach().contiguous().flatten().view(torch.uint8)
    if stored.storage_offset() % 8:
        stored = stored.clone()
    whole = len(stored) // 8 * 8
    words = stored[:whole].view(torch.int64)
    factors = _factors(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in (*words.split(_CHUNK), stored[whole:].to(torch.int64)):
        # A product keeps only the lowest bit of a change in the highest, so the high bits are folded down first.
        mixed = part ^ (part >> 29)
        total = total * 31 + (mixed * factors[: len(part)]).sum()
    return total


@functools.cache
def _factors(device: torch.device) -> Tensor:
    return (torch.arange(_CHUNK, device=device) * _SPREAD) | 1


def keep_masks_from_ddp(model: PromptedSparseModel) -> None:
    """Let DDP send no masks before every forward: they follow from the scores on every process."""
    masks = {id(mask) for mask in model.masks().values()}
    model._ddp_params_and_buffers_to_ignore = [name for name, buffer in model.named_buffers() if id(buffer) in masks]
