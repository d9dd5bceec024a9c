"""Images a second of the data loader alone, against those of a training step of ViT-S/16 at 224 pixels.

    python benchmarks/data_loading.py [--images 128] [--workers 0 1 2] [--threads 2] [--repeats 3] [--device cpu]

Makes JPEG photos of about 500 x 400 pixels on the fly; needs no network, 2 GB of memory and 200 MB of disk for a
minute. Every row is measured once in each of the repeats, in turn, and the best of each is shown, so that
other work on the machine disturbs all of them alike. The training step is one of the search of VPNs: forward, backward
and the selection of the mask, on a model with random weights.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from common import write_table
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from vpns_hf import PromptedSparseModel, load_transfer_dataset
from vpns_hf.data import ImageTransforms, RoleBatchSampler, RoleDataset, TransferSplits, collate_images
from vpns_hf.data.splits import SplitView

SIDE, CLASSES = 224, 10


def main() -> None:
    """Measure every pass and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="of the training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of the training step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        splits, megabytes = make_photos(Path(folder), args.images)
        passes = {
            f"{name}, {workers} workers": loader_pass(views, args.batch_size, workers)
            for name, views in make_views(splits).items()
            for workers in args.workers
        }
        passes[f"training step, {args.device}, {args.threads} threads"] = training_pass(args.batch_size, args.device)
        speeds = best_speeds(passes, args.repeats)
    step = list(speeds.values())[-1]
    rows = [(name, f"{speed:.1f}", f"{speed / step:.1f} x") for name, speed in speeds.items()]
    about = (
        f"{__doc__}\n{args.images} photos, {megabytes:.1f} MB; batches of {args.batch_size}; best of {args.repeats}."
    )
    write_table("data_loading", about, ("what", "images/s", "of the training step"), rows)


def make_photos(folder: Path, count: int) -> tuple[TransferSplits, float]:
    """Photos as JPEG files in an arrow data set on disk, and their size."""
    rng = np.random.default_rng(0)
    files = [photo(rng) for _ in range(count)]
    features = Features({"image": datasets.Image(), "label": ClassLabel(CLASSES)})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [i % CLASSES for i in range(count)]}
    data = Dataset.from_dict(rows, features=features)
    DatasetDict(train=data, validation=data.select([0]), test=data.select([0])).save_to_disk(folder / "photos")
    return load_transfer_dataset(folder / "photos"), sum(map(len, files)) / 1e6


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG file of about the size and detail of a photo: soft shapes and fine grain."""
    width, height = int(rng.integers(450, 550)), int(rng.integers(350, 450))
    shapes = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 8, (height, width, 3))
    content = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def make_views(splits: TransferSplits) -> dict[str, tuple[SplitView, SplitView]]:
    """The views of plain and of prompted batches, by what is done to make them."""
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    views = {}
    for augmentation in ("paper", "randaugment"):
        transforms = ImageTransforms(processor, (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, augmentation)
        train = splits["train"], splits.rows["train"]
        views[augmentation] = (splits.view("train", transforms.train), splits.view("train", transforms.eval))
        views[f"{augmentation}, cache_images"] = (
            transforms.cached_train_view(*train),
            transforms.cached_eval_view(*train),
        )
    return views


def loader_pass(views: tuple[SplitView, SplitView], batch_size: int, workers: int) -> Callable[[], int]:
    """One epoch of batches as the search draws them, prompted and plain in turn; returns the images in it."""
    sampler = RoleBatchSampler(len(views[0]), batch_size, "alternate")
    # Workers stay, because starting them costs more than reading so few images.
    loader = DataLoader(
        RoleDataset(*views, sampler),
        batch_sampler=sampler,
        collate_fn=collate_images,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: sum(len(batch["labels"]) for batch in loader)


def training_pass(batch_size: int, device: str) -> Callable[[], int]:
    """Two training steps of the search; returns the images in them."""
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=CLASSES
    )
    model = PromptedSparseModel.from_backbone(
        ViTForImageClassification(config), sparsity=0.9, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).to(device)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    pixels = torch.zeros(batch_size, 3, SIDE, SIDE, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)

    def steps() -> int:
        for use_prompt in (True, False):
            model(pixel_values=pixels, labels=labels, use_prompt=use_prompt).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_masks()
        if device != "cpu":
            torch.cuda.synchronize()
        return 2 * batch_size

    return steps


def best_speeds(passes: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Images a second of every pass, the best of several rounds in which all take turns."""
    best = dict.fromkeys(passes, 0.0)
    for each in passes.values():
        each()  # starts the workers and warms the caches
    for _ in range(repeats):
        for name, each in passes.items():
            start = time.perf_counter()
            images = each()
            best[name] = max(best[name], images / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
