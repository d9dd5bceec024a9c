"""Observe the inputs of layers with prunable weights, and unfold them into the columns of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..masking.prunable import PrunableWeight

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def observe_inputs(
    prunables: Mapping[str, PrunableWeight], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Report every call of a layer that holds a prunable weight, as long as the context is open.

    Args:
        prunables: prunable weights by name, of a model in the dense or frozen state.
        see: function of the name of the weight, and the input and the output of its layer.

    Raises:
        ValueError: on closing, a layer was never called, or is no linear or convolution layer, so that its weight is
            used in a way that hooks do not see (as those of `nn.MultiheadAttention` are).
    """
    unseen = set(prunables)

    def hook(name: str) -> Callable[..., None]:
        def report(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
            unseen.discard(name)
            see(name, args[0] if args else kwargs["input"], output)

        return report

    handles = [
        prunable.module.register_forward_hook(hook(name), with_kwargs=True)
        for name, prunable in prunables.items()
        if isinstance(prunable.module, (nn.Linear, *_CONVOLUTIONS))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if unseen:
        raise _unobservable(
            next(name for name in prunables if name in unseen), "is not called as a linear or convolution"
        )


def _unobservable(name: str, reason: str) -> ValueError:
    return ValueError(
        f"The inputs of {name} cannot be observed, because its layer {reason}; list it in `ignore_modules`."
    )


def input_columns(name: str, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Unfold the inputs of one call of a layer into a matrix for each group of a convolution.

    Args:
        name: name of the weight, for errors.
        layer: a linear or convolution layer.
        inputs: tensor [n, ..., features] or [n, channels, ...]; n may differ from that of `outputs`.
        outputs: output of the layer; its size determines the padding of a convolution.

    Returns:
        [groups, positions, columns]: a row for every position that the weight is applied to, whose columns are in the
        order of `weight.flatten(1)`.

    Raises:
        ValueError: the layer pads its input in a way of its own.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    assert isinstance(layer, _CONVOLUTIONS)
    count = len(layer.kernel_size)
    paddings = _paddings(name, layer, inputs.shape[2:], outputs.shape[2:])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patches = F.pad(inputs, [side for pair in reversed(paddings) for side in pair], mode)
    for dim, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        patches = patches.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # [n, groups, channels, positions..., kernel...]
    patches = patches.unflatten(1, (layer.groups, -1))
    dims = range(patches.dim())
    patches = patches.permute(1, 0, *dims[3 : 3 + count], 2, *dims[3 + count :])
    return patches.flatten(2 + count).flatten(1, 1 + count)


def _paddings(
    name: str, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, sizes: Sequence[int], outputs: Sequence[int]
) -> list[tuple[int, int]]:
    """Infer the padding before and after each dimension.

    Some layers pad their input in `forward`, so that the output has `ceil(size / stride)` positions as in TensorFlow;
    the size of their output shows it, and `padding` does not.
    """
    declared = (0,) * len(sizes) if isinstance(layer.padding, str) else layer.padding
    paddings = []
    for dim, (size, output) in enumerate(zip(sizes, outputs, strict=True)):
        reach, stride = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1, layer.stride[dim]
        missing = (output - 1) * stride + reach - size
        if (size + 2 * declared[dim] - reach) // stride + 1 == output:
            paddings.append((declared[dim], declared[dim]))
        elif output == -(-size // stride) and missing > 0:
            paddings.append((missing // 2, missing - missing // 2))
        else:
            raise _unobservable(
                name, f"has {output} output positions for {size} input positions, by a padding of its own"
            )
    return paddings
