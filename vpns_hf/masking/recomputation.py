"""Recompute masked weights in the backward pass instead of saving them in the forward pass.

Autograd saves the weight of each layer for the backward pass. A masked weight is a tensor of its own, so all layers
together would save a second copy of all weights. Recomputing one from the weight and its mask is cheap.
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
    """Recompute the tensors registered by [`can_recompute`] in the backward pass instead of saving them.

    Results do not change. Saved-tensor hooks that are set further inside, such as those of activation checkpointing,
    take precedence there. Nothing is recomputed where such hooks are active already, such as those of
    `torch.autograd.graph.save_on_cpu`, nor in compiled graphs, which choose the tensors that they save.
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
        # The graph holds the hooks, and they would hold the last tensor.
        vars(recomputation).clear()


def _has_hooks() -> bool:
    # No public function reports the active hooks; activation checkpointing in torch calls this one, too.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def can_recompute(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Register a tensor as `function(*inputs)`, so that the backward pass recomputes it.

    Args:
        tensor: the tensor; only the last one that was registered counts.
        function: the operation that computes it, in the same memory format.
        inputs: the arguments of that operation, not modified before the backward pass.
    """
    if not torch.compiler.is_compiling() and (recomputation := _active.get()) is not None:
        recomputation.storage, recomputation.version = tensor.untyped_storage(), tensor._version
        recomputation.function, recomputation.inputs = function, inputs


class _Recomputation:
    # Holding the storage prevents another tensor from taking its address.
    storage: torch.UntypedStorage | None = None
    version: int
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def pack(self, tensor: Tensor) -> _Saved:
        if not self._covers(tensor):
            return _Saved(lambda saved: saved, (tensor,))
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        function = self.function
        return _Saved(lambda *inputs: function(*inputs).as_strided(size, stride, offset), self.inputs)

    def _covers(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the registered one or a view of it, unmodified since."""
        # Sparse tensors have no storage, and all storages of the meta device have the address 0.
        return (
            self.storage is not None
            and torch._C._has_storage(tensor)
            and tensor.untyped_storage()._cdata == self.storage._cdata
            and tensor._version == self.version
        )


class _Saved:
    """The operation and the inputs from which the backward pass recomputes a tensor."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.function, self.inputs = function, inputs
        self.versions = [tensor._version for tensor in inputs]

    @torch.no_grad()
    def tensor(self) -> Any:
        """Recompute the tensor.

        Raises:
            RuntimeError: an input was modified in place after the forward pass.
        """
        # Autograd checks versions only of tensors without saved-tensor hooks.
        if [tensor._version for tensor in self.inputs] != self.versions:
            raise RuntimeError(
                "A tensor that the backward pass needs was modified in place after the forward pass; change weights, "
                "scores and masks (`update_masks`) only after `backward`."
            )
        return self.function(*self.inputs)
