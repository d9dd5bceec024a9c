"""Size, speed and memory of packed files, side by side with dense ones, on a ViT-B/16 with random weights.

    python benchmarks/storage.py [--repeats 9] [--threads 2] [--sparsity 0.9]

Needs no network, 4 GB of memory and 1 GB of disk for a few minutes. Dense and packed take turns, and the median of
each is shown. A dense file is only mapped by `from_pretrained` and read when the weights are first used, so loading is
also measured up to there.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from vpns_hf import PromptedSparseModel, masking, storage


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the model that is timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{torch.get_num_threads()} threads, median of {args.repeats}\n")
        print_sizes(Path(folder))
        model = sparse_vit(args.sparsity)
        print_speed(model, Path(folder), args.repeats)
        print_memory(model, Path(folder))


def sparse_vit(sparsity: float) -> PromptedSparseModel:
    """A ViT-B/16 with frozen masks."""
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


def entropy(sparsity: float) -> float:
    """Bits that a mask takes at least, for each entry."""
    return -sum(p * math.log2(p) for p in (sparsity, 1 - sparsity) if p)


def bound(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    """Bytes that the tensors take at least: entropy of the masks, kept values, and the rest as it is."""
    total = 0.0
    for name, tensor in tensors.items():
        density = float(masks[name].float().mean()) if name in masks else 1.0
        total += tensor.numel() * (entropy(density) / 8 + density * tensor.itemsize)
    return total


def print_sizes(folder: Path) -> None:
    """How far files are from the bound, with a random mask of the same sparsity on every prunable weight."""
    print("| dtype | sparsity | bytes | above the bound | save s | load s |\n|---|---|---|---|---|---|")
    model = ViTForImageClassification(ViTConfig(num_labels=10))
    weights, prunable = model.state_dict(), list(masking.prunable_slots(model))
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
            masks = {name: torch.rand(weights[name].shape) >= sparsity for name in prunable}
            tensors = {
                name: (weight.masked_fill(~masks[name], 0) if name in masks else weight).to(dtype)
                for name, weight in weights.items()
            }
            file = folder / "sizes.safetensors"
            saving = min(seconds(lambda: storage.save_packed(file, tensors, masks, {})) for _ in range(3))  # noqa: B023
            loading = min(seconds(lambda: storage.load_packed(file)) for _ in range(3))  # noqa: B023
            size, least = file.stat().st_size, bound(tensors, masks)
            print(f"| {dtype} | {sparsity:.0%} | {size:,} | {size / least - 1:.2%} | {saving:.2f} | {loading:.2f} |")


def print_speed(model: PromptedSparseModel, folder: Path, repeats: int) -> None:
    """Times of saving and loading a folder, packed over dense."""
    print("\n| | dense s | packed s | ratio |\n|---|---|---|---|")

    def save(packed: bool) -> None:
        model.save_pretrained(folder / str(packed), packed=packed)

    def load(packed: bool) -> PromptedSparseModel:
        return PromptedSparseModel.from_pretrained(folder / str(packed))

    def load_and_read(packed: bool) -> None:
        for tensor in load(packed).state_dict().values():
            tensor.sum()

    for name, action in [
        ("save_pretrained", save),
        ("from_pretrained", load),
        ("from_pretrained and first use of every weight", load_and_read),
    ]:
        dense, packed = side_by_side(action, repeats)
        print(f"| {name} | {dense:.3f} | {packed:.3f} | {packed / dense:.2f} |")


def side_by_side(action: Callable[[bool], object], repeats: int) -> tuple[float, float]:
    """Median seconds of `action(False)` and `action(True)`, in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for packed, found in times.items():
            found.append(seconds(lambda: action(packed)))  # noqa: B023
    return statistics.median(times[False]), statistics.median(times[True])


def seconds(action: Callable[[], object]) -> float:
    """Time of a call, with what came before it cleaned up."""
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def print_memory(model: PromptedSparseModel, folder: Path) -> None:
    """Resident memory beyond the tensors themselves at the highest point, by Linux' own count."""
    masks = model.masks()
    tensors = {name: tensor for name, tensor in model.backbone.state_dict().items() if not name.endswith("_mask")}
    largest = max(tensor.nbytes for tensor in tensors.values())
    file = folder / "memory.safetensors"
    saving = peak(lambda: storage.save_packed(file, tensors, masks, {}))
    loaded: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]] = []
    loading = peak(lambda: loaded.append(storage.load_packed(file)))
    loading -= sum(tensor.nbytes for group in loaded[0][:2] for tensor in group.values())
    print("\n| | extra bytes | of the largest tensor |\n|---|---|---|")
    for name, extra in [("save_packed", saving), ("load_packed", loading)]:
        print(f"| {name} | {extra:,} | {extra / largest:.2f} |")


def peak(action: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most during a call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
