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
    checkpointing, take over there, and nothing is done where there are hooks already, such as those of
    `torch.autograd.graph.save_on_cpu`; compiled graphs decide for themselves what they keep.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _has_hooks():
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
        vars(recomputation).clear()


def _has_hooks() -> bool:
    # torch tells of the hooks that are set nowhere else; its own checkpointing asks here, too.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def can_be_made_again(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Say that `function(*inputs)` gives the values of a tensor, in the same memory format."""
    if not torch.compiler.is_compiling() and (recomputation := _active.get()) is not None:
        recomputation.storage, recomputation.version = tensor.untyped_storage(), tensor._version
        recomputation.function, recomputation.inputs = function, inputs


class _Recomputation:
    # The storage is held, so that another tensor cannot come to lie in its place.
    storage: torch.UntypedStorage | None = None
    version: int
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def pack(self, tensor: Tensor) -> _Saved:
        if not self._shows(tensor):
            return _Saved(lambda kept: kept, (tensor,))
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        function = self.function
        return _Saved(lambda *inputs: function(*inputs).as_strided(size, stride, offset), self.inputs)

    def _shows(self, tensor: Tensor) -> bool:
        """Whether it is the tensor that was told of, or a view of it, with the values that it had then."""
        # Some have no storage, as sparse ones, and those of the meta device all have the address 0.
        return (
            self.storage is not None
            and torch._C._has_storage(tensor)
            and tensor.untyped_storage()._cdata == self.storage._cdata
            and tensor._version == self.version
        )


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
