"""Whether all processes of a run hold the same scores, masks, prompt and weights, told by hashes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import sharding
from .modeling import PromptedSparseModel

_CHUNK = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The golden ratio in 64 bits, as a signed number: its odd multiples spread over all of them.
_SPREAD = -0x61C8864680B583EB


class ConsistencyCheck(TrainerCallback):
    """Compares the processes before the first step of a stage, after every few steps, and after the last one.

    Args:
        accelerator: of the trainer.
        steps: optimizer steps between two comparisons.
    """

    def __init__(self, accelerator: Accelerator, steps: int):
        self.accelerator, self.steps = accelerator, steps

    def on_train_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(state, kwargs["model"])

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            self._check(state, kwargs["model"])

    def _check(self, state: TrainerState, model: PromptedSparseModel) -> None:
        compare_processes(self.accelerator, model, f"after step {state.global_step}")


def compare_processes(accelerator: Accelerator, model: PromptedSparseModel, when: str) -> None:
    """Raise on every process unless all hold the same; all call it together.

    Sharded tensors are left out: there is one copy of each.

    Args:
        model: the model itself, not wrapped.
        when: is said in the error.

    Raises:
        RuntimeError: names what differs, and where.
    """
    kinds: dict[str, Iterable[Tensor]] = {
        "masks": model.masks().values(),
        **{role: parameters.values() for role, parameters in model.parameters_by_role().items()},
    }
    own = torch.stack([_hash_all(tensors, accelerator.device) for tensors in kinds.values()])
    everyone = accelerator.gather(own[None])
    differs = everyone != everyone[0]
    if not differs.any():
        return
    names = [name for name, column in zip(kinds, differs.T.tolist(), strict=True) if any(column)]
    processes = [str(index) for index, row in enumerate(differs.tolist()) if any(row)]
    raise RuntimeError(
        f"The processes hold different {' and '.join(names)} {when}: process {', '.join(processes)} against process 0."
        " Look for code that changes the model on some processes only, or draws without the common seed, then go on "
        "from the last checkpoint with `resume_from_checkpoint=True`."
    )


def _hash_all(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        if not sharding.is_sharded([tensor]):
            total = total * 31 + hash_tensor(tensor)
    return total


@torch.no_grad()
def hash_tensor(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the bits of a tensor and where they stand, on its device: int64, no dimensions.

    The sum of every element's bits times an odd number that belongs to its row-major position, modulo 2 ** 64.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * ((positions * _SPREAD) | 1)).sum()
    return total
