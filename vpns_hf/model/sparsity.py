"""Report kept and total weights, bytes and multiply-accumulates, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..masking.prunable import PrunableWeight, stored_weight
from .checks import image_channels


@dataclass(frozen=True)
class KeptEntries:
    """Numbers of kept and of all entries of a prunable weight."""

    name: str
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that are masked; 0 where there are none."""
        return 1 - self.kept / self.total if self.total else 0.0


class KeptInLayers:
    """Base of classes with `layers`, whose kept entries it sums."""

    layers: tuple[KeptEntries, ...]

    def whole(self) -> KeptEntries:
        """Sum all layers under the name `total`."""
        kept, total = sum(layer.kept for layer in self.layers), sum(layer.total for layer in self.layers)
        return KeptEntries("total", kept, total)

    @property
    def kept(self) -> int:
        """Prunable weights that are kept."""
        return self.whole().kept

    @property
    def total(self) -> int:
        """Prunable weights."""
        return self.whole().total

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are masked; 0 where there are none."""
        return self.whole().sparsity


@dataclass(frozen=True)
class LayerSparsity(KeptEntries):
    """One prunable weight: entries kept and in all, and the multiply-accumulates of one image with both."""

    macs: int
    kept_macs: int


@dataclass(frozen=True)
class SparsityReport(KeptInLayers):
    """Sparsity of a model, layer by layer.

    Args:
        layers: the prunable weights, in module order.
        parameters: number of all parameters of the backbone, prunable or not.
        dense_bytes: bytes of the backbone with every weight stored.
        kept_bytes: bytes of the values that are not pruned, masks not counted.
        pattern: pattern of the masks; weights whose shape does not take it are no layers here.
    """

    layers: tuple[LayerSparsity, ...]
    parameters: int
    dense_bytes: int
    kept_bytes: int
    pattern: str = "unstructured"

    @property
    def sparsity_of_all_parameters(self) -> float:
        """Fraction of all parameters of the backbone that are masked."""
        return (self.total - self.kept) / self.parameters

    def whole(self) -> LayerSparsity:
        """Sum all layers under the name `total`."""
        return _summed("total", self.layers)

    def blocks(self) -> dict[str, LayerSparsity]:
        """Sum layers by block: the name up to and including its last number, or the module of the layer."""
        blocks: dict[str, list[LayerSparsity]] = {}
        for layer in self.layers:
            blocks.setdefault(block_name(layer.name), []).append(layer)
        return {name: _summed(name, layers) for name, layers in blocks.items()}

    def to_markdown(self) -> str:
        """Format a table with one row per layer and a total."""
        rows = ["| weight | kept | total | sparsity | MACs kept |", "|---|---:|---:|---:|---:|"]
        for layer in (*self.layers, self.whole()):
            rows.append(
                f"| {layer.name} | {layer.kept:,} | {layer.total:,} | {layer.sparsity:.2%} | {layer.kept_macs:,} |"
            )
        return "\n".join(rows)

    def to_json(self) -> str:
        """Format all figures as a JSON object."""
        totals = {"sparsity": self.sparsity, "sparsity_of_all_parameters": self.sparsity_of_all_parameters}
        return json.dumps(asdict(self) | totals, indent=2)


def _summed(name: str, layers: Sequence[LayerSparsity]) -> LayerSparsity:
    figures = [(layer.kept, layer.total, layer.macs, layer.kept_macs) for layer in layers]
    return LayerSparsity(name, *map(sum, zip(*figures, strict=True)))


def block_name(weight: str) -> str:
    """Return the block of a weight: its name up to the last number, or its module where there is none."""
    parts = weight.split(".")[:-1]
    last_number = max((index for index, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last_number + 1])


def measure_sparsity(
    backbone: nn.Module,
    prunables: Mapping[str, PrunableWeight],
    masks: Mapping[str, Tensor],
    image_size: Sequence[int] | None,
    forward_kwargs: Mapping[str, bool],
    pattern: str,
) -> SparsityReport:
    """Count kept weights, bytes, and multiply-accumulates in a forward pass of one image.

    Args:
        backbone: model that owns the weights; run once in eval mode without gradient.
        prunables: prunable weights by name.
        masks: bool tensors by weight name.
        image_size: (height, width) of the image; None leaves the multiply-accumulates at 0.
        forward_kwargs: further arguments of the backbone.
        pattern: name of the pattern of the masks.
    """
    positions = count_positions(backbone, prunables, image_size, forward_kwargs)
    layers = tuple(
        LayerSparsity(
            name, kept := int(mask.sum()), mask.numel(), positions[name] * mask.numel(), positions[name] * kept
        )
        for name, mask in masks.items()
    )
    parameters = [p for name, p in backbone.named_parameters() if not name.endswith(".scores")]
    dense_bytes = sum(p.numel() * p.element_size() for p in parameters)
    pruned_bytes = sum(
        (~masks[name]).sum().item() * stored_weight(prunable).element_size() for name, prunable in prunables.items()
    )
    count, kept_bytes = sum(p.numel() for p in parameters), dense_bytes - int(pruned_bytes)
    return SparsityReport(layers, count, dense_bytes, kept_bytes, pattern)


@torch.no_grad()
def count_positions(
    backbone: nn.Module,
    prunables: Mapping[str, PrunableWeight],
    image_size: Sequence[int] | None,
    forward_kwargs: Mapping[str, bool],
) -> dict[str, int]:
    """Count the applications of each weight matrix to one image of (height, width); 0 without a size."""
    positions = dict.fromkeys(prunables, 0)
    if image_size is None:
        return positions
    handles = []
    for name, prunable in prunables.items():

        def count(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...], name: str = name) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            channels = first.shape[1] if isinstance(module, nn.modules.conv._ConvNd) else first.shape[-1]
            positions[name] += first.numel() // channels

        handles.append(prunable.module.register_forward_hook(count))
    parameter = next(backbone.parameters())
    training = backbone.training
    image = torch.zeros(1, image_channels(backbone), *image_size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()(pixel_values=image, **forward_kwargs)
    backbone.train(training)
    for handle in handles:
        handle.remove()
    return positions
