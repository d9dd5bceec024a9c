"""Tensors that are made anew in the backward pass in place of being kept for it.

A layer keeps its weight for its backward pass. A masked weight is a tensor of its own, so all layers together would
keep a second copy of all weights, and it takes but a moment to make it again from the weight and its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_active: ContextVar[_Recomputation | None] = ContextVar("recomputation", default=None)


@contextmanager
def recomputing() -> Iterator[None]:
    """Within, no operation keeps a tensor for its backward pass that [`can_be_made_again`] was told of just before.

    It changes no result. Hooks for saved tensors that are set further inside, such as those of activation
    checkpointing, take over there; compiled graphs decide for themselves what they keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    recomputation = _Recomputation()
    token = _active.set(recomputation)
    try:
        with saved_tensors_hooks(recomputation.pack, _Saved.tensor):
            yield
    finally:
        _active.reset(token)
        # The graph keeps the hooks, which would keep the last tensor.
        recomputation.storage = None


def can_be_made_again(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Say that `function(*inputs)` gives the values of a tensor, in the same memory format."""
    if not torch.compiler.is_compiling() and (recomputation := _active.get()) is not None:
        recomputation.storage = tensor.untyped_storage()
        recomputation.function, recomputation.inputs = function, inputs


class _Recomputation:
    # The storage is held, so that its address cannot become that of another tensor.
    storage: torch.UntypedStorage | None = None
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def pack(self, tensor: Tensor) -> _Saved:
        if self.storage is None or tensor.untyped_storage().data_ptr() != self.storage.data_ptr():
            return _Saved(lambda kept: kept, (tensor,))
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        function = self.function
        return _Saved(lambda *inputs: function(*inputs).as_strided(size, stride, offset), self.inputs)


class _Saved:
    """What the backward pass gets a tensor from."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.function, self.inputs = function, inputs
        self.versions = [tensor._version for tensor in inputs]

    @torch.no_grad()
    def tensor(self) -> Any:
        """The tensor as it was.

        Raises:
            RuntimeError: something that it is made from was changed after the forward pass.
        """
        # Autograd checks this itself only for tensors without hooks.
        if [tensor._version for tensor in self.inputs] != self.versions:
            raise RuntimeError(
                "A tensor that the backward pass needs was modified in place after the forward pass; change weights, "
                "scores and masks (`update_masks`) only after `backward`."
            )
        return self.function(*self.inputs)
