"""What a mask leaves: kept and total weights, bytes and multiply-accumulates, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..masking.prunable import PrunableWeight, stored_weight


@dataclass(frozen=True)
class KeptEntries:
    """How many entries of a prunable weight are kept, and how many it has."""

    name: str
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that are masked; 0 where there are none."""
        return 1 - self.kept / self.total if self.total else 0.0


class KeptInLayers:
    """Base of what has `layers`: what they keep together."""

    layers: tuple[KeptEntries, ...]

    def whole(self) -> KeptEntries:
        """All layers summed, under the name `total`."""
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
    """

    layers: tuple[LayerSparsity, ...]
    parameters: int
    dense_bytes: int
    kept_bytes: int

    @property
    def sparsity_of_all_parameters(self) -> float:
        """Fraction of all parameters of the backbone that are masked."""
        return (self.total - self.kept) / self.parameters

    def whole(self) -> LayerSparsity:
        """All layers summed, under the name `total`."""
        return _summed("total", self.layers)

    def blocks(self) -> dict[str, LayerSparsity]:
        """Layers summed by block: the name up to and including its last number, or the layer's own module."""
        blocks: dict[str, list[LayerSparsity]] = {}
        for layer in self.layers:
            blocks.setdefault(block_name(layer.name), []).append(layer)
        return {name: _summed(name, layers) for name, layers in blocks.items()}

    def to_markdown(self) -> str:
        """A table with one row per layer and a total."""
        rows = ["| weight | kept | total | sparsity | MACs kept |", "|---|---:|---:|---:|---:|"]
        for layer in (*self.layers, self.whole()):
            rows.append(
                f"| {layer.name} | {layer.kept:,} | {layer.total:,} | {layer.sparsity:.2%} | {layer.kept_macs:,} |"
            )
        return "\n".join(rows)

    def to_json(self) -> str:
        """All figures as a JSON object."""
        totals = {"sparsity": self.sparsity, "sparsity_of_all_parameters": self.sparsity_of_all_parameters}
        return json.dumps(asdict(self) | totals, indent=2)


def _summed(name: str, layers: Sequence[LayerSparsity]) -> LayerSparsity:
    figures = [(layer.kept, layer.total, layer.macs, layer.kept_macs) for layer in layers]
    return LayerSparsity(name, *map(sum, zip(*figures, strict=True)))


def block_name(weight: str) -> str:
    """The block that a weight belongs to: its name up to the last number, or its own module where there is none."""
    parts = weight.split(".")[:-1]
    last_number = max((index for index, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
    return ".".join(parts[: last_number + 1])


def measure_sparsity(
    backbone: nn.Module,
    slots: Mapping[str, PrunableWeight],
    masks: Mapping[str, Tensor],
    image_size: Sequence[int] | None,
    forward_kwargs: Mapping[str, bool],
) -> SparsityReport:
    """Count what the masks keep; multiply-accumulates are counted in one forward pass of one image.

    Args:
        backbone: the model that holds the slots; run once in eval mode without gradient.
        masks: bool tensors by weight name.
        image_size: (height, width) of that image; None leaves the multiply-accumulates at 0.
        forward_kwargs: passed to the backbone with the image.
    """
    positions = _positions(backbone, slots, image_size, forward_kwargs)
    layers = tuple(
        LayerSparsity(
            name, kept := int(mask.sum()), mask.numel(), positions[name] * mask.numel(), positions[name] * kept
        )
        for name, mask in masks.items()
    )
    parameters = [p for name, p in backbone.named_parameters() if not name.endswith(".scores")]
    dense_bytes = sum(p.numel() * p.element_size() for p in parameters)
    pruned_bytes = sum(
        (~masks[name]).sum().item() * stored_weight(slot).element_size() for name, slot in slots.items()
    )
    return SparsityReport(layers, sum(p.numel() for p in parameters), dense_bytes, dense_bytes - int(pruned_bytes))


@torch.no_grad()
def _positions(
    backbone: nn.Module,
    slots: Mapping[str, PrunableWeight],
    image_size: Sequence[int] | None,
    forward_kwargs: Mapping[str, bool],
) -> dict[str, int]:
    """How many times one image uses each weight matrix."""
    positions = dict.fromkeys(slots, 0)
    if image_size is None:
        return positions
    handles = []
    for name, slot in slots.items():

        def count(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...], name: str = name) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            channels = first.shape[1] if isinstance(module, nn.modules.conv._ConvNd) else first.shape[-1]
            positions[name] += first.numel() // channels

        handles.append(slot.module.register_forward_hook(count))
    channels = next(stored_weight(slot).shape[1] for slot in slots.values())
    parameter = next(backbone.parameters())
    training = backbone.training
    image = torch.zeros(1, channels, *image_size, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()(pixel_values=image, **forward_kwargs)
    backbone.train(training)
    for handle in handles:
        handle.remove()
    return positions
