"""Size, speed and memory of packed files, side by side with dense ones, on a ViT-B/16 with random weights.

    python benchmarks/storage.py [--repeats 9] [--threads 2] [--sparsity 0.9]

Needs no network, 4 GB of memory and 1.5 GB of disk for a few minutes. Prints the tables and writes them to
`benchmarks/results/storage.md`.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, table, time_in_turns, write_results
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from vpns_hf import PromptedSparseModel, masking, storage
from vpns_hf.inference import resident_bytes

SPARSITIES = (0.5, 0.7, 0.9, 0.95, 0.99)


def main() -> None:
    """Measure, print and write the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the model that is timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections = [
            f"# Packed files of a ViT-B/16\n\n`python benchmarks/storage.py`. Machine: {machine()}.",
            f"## Size\n\n{sizes(folder)}",
        ]
        model = sparse_vit(args.sparsity)
        sections += [
            f"## Speed\n\n{speed(model, folder, args.repeats, args.sparsity)}",
            f"## Memory\n\n{memory(model, folder)}",
        ]
    write_results("storage", sections)


def sparse_vit(sparsity: float) -> PromptedSparseModel:
    """A ViT-B/16 with frozen masks, the largest weights of all layers kept."""
    model = PromptedSparseModel.from_backbone(
        ViTForImageClassification(ViTConfig(num_labels=10)),
        sparsity=sparsity,
        prompt="pad",
        prompt_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    model.freeze_masks()
    return model


def sizes(folder: Path) -> str:
    """How far files are from the bound, with a random mask of the same sparsity on every prunable weight."""
    model = ViTForImageClassification(ViTConfig(num_labels=10))
    weights, prunable, rows = model.state_dict(), list(masking.find_prunable_weights(model)), []
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in SPARSITIES:
            masks = {name: torch.rand(weights[name].shape) >= sparsity for name in prunable}
            tensors = {
                name: (weight.masked_fill(~masks[name], 0) if name in masks else weight).to(dtype)
                for name, weight in weights.items()
            }
            file = folder / "sizes.safetensors"
            storage.save_packed(file, tensors, masks, {})
            size, least = file.stat().st_size, bound(tensors, masks)
            dense = sum(tensor.nbytes for tensor in tensors.values())
            rows.append(
                [8 * dtype.itemsize, f"{sparsity:.0%}", f"{size:,}", f"{size / dense:.1%}", f"{size / least - 1:.2%}"]
            )
    note = (
        "The bound is, for every masked weight of n entries, sparsity s and b bits, n (H(s) + (1 - s) b) bits, and "
        "the rest as it is. Random masks have no pattern that a coding could use."
    )
    return note + "\n\n" + table(["bits", "sparsity", "bytes", "of the dense file", "above the bound"], rows)


def bound(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    """Bytes that the tensors take at least: entropy of the masks, kept values, and the rest as it is."""
    total = 0.0
    for name, tensor in tensors.items():
        density = float(masks[name].double().mean()) if name in masks else 1.0
        total += tensor.numel() * (entropy(density) / 8 + density * tensor.itemsize)
    return total


def entropy(sparsity: float) -> float:
    """Bits that a mask takes at least, for each entry."""
    return -sum(p * math.log2(p) for p in (sparsity, 1 - sparsity) if p)


def speed(model: PromptedSparseModel, folder: Path, repeats: int, sparsity: float) -> str:
    """Times of saving and loading a folder, packed over dense, and over transformers' own class."""

    def save(packed: bool) -> None:
        model.save_pretrained(folder / str(packed), packed=packed)

    def load(packed: bool) -> PromptedSparseModel:
        return PromptedSparseModel.from_pretrained(folder / str(packed))

    def load_stock() -> ViTForImageClassification:
        return ViTForImageClassification.from_pretrained(folder / "stock")

    def read(loaded: torch.nn.Module) -> torch.nn.Module:
        for tensor in loaded.state_dict().values():
            tensor.sum()
        return loaded

    stock = ViTForImageClassification(ViTConfig(num_labels=10))
    samples = time_in_turns(
        {
            "save_pretrained: stock": lambda: stock.save_pretrained(folder / "stock"),
            "save_pretrained: dense": lambda: save(False),
            "save_pretrained: packed": lambda: save(True),
            "from_pretrained: stock": load_stock,
            "from_pretrained: dense": lambda: load(False),
            "from_pretrained: packed": lambda: load(True),
            "from_pretrained and first use: stock": lambda: read(load_stock()),
            "from_pretrained and first use: dense": lambda: read(load(False)),
            "from_pretrained and first use: packed": lambda: read(load(True)),
        },
        repeats,
    )
    rows = []
    for action in ("save_pretrained", "from_pretrained", "from_pretrained and first use"):
        least = {kind: min(samples[f"{action}: {kind}"]) for kind in ("stock", "dense", "packed")}
        middle = {kind: statistics.median(samples[f"{action}: {kind}"]) for kind in least}
        rows.append(
            [
                action,
                *(f"{least[kind]:.3f} / {middle[kind]:.3f}" for kind in least),
                *(
                    f"{least['packed'] / least[kind]:.2f} / {middle['packed'] / middle[kind]:.2f}"
                    for kind in ("dense", "stock")
                ),
            ]
        )
    note = (
        f"At {sparsity:.0%} in float32; seconds and ratios, minimum / median of {repeats} calls in turns. Dense is "
        "this model saved with `packed=False`, stock is `ViTForImageClassification`. A dense file is only mapped by "
        "`from_pretrained` and read when a weight is first used, a packed one is unpacked at once, so the last line "
        "adds one sum over every tensor. Both files are in the page cache."
    )
    head = ["", "stock", "dense", "packed", "packed / dense", "packed / stock"]
    return note + "\n\n" + table(head, rows)


def memory(model: PromptedSparseModel, folder: Path) -> str:
    """Resident memory beyond the tensors themselves at the highest point, by Linux' own count."""
    masks = model.masks()
    tensors = {name: tensor for name, tensor in model.backbone.state_dict().items() if not name.endswith("_mask")}
    largest = max(tensor.nbytes for tensor in tensors.values())
    file = folder / "memory.safetensors"
    saving = peak(lambda: storage.save_packed(file, tensors, masks, {}))
    loaded: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]] = []
    loading = peak(lambda: loaded.append(storage.load_packed(file)))
    loading -= sum(tensor.nbytes for group in loaded[0][:2] for tensor in group.values())
    rows = [
        [name, f"{extra / 2**20:.1f}", f"{extra / largest:.2f}"]
        for name, extra in [("save_packed", saving), ("load_packed", loading)]
    ]
    return table(["beyond the tensors themselves", "MiB", "of the largest tensor"], rows)


def peak(action: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most during a call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS") or 0
    action()
    return (resident_bytes("VmHWM") or 0) - before


if __name__ == "__main__":
    main()
