"""Write the demo's data: a class-balanced subset of Fashion-MNIST as two parquet files.

800 images of each of the ten classes are drawn from the official training split and 200 of each from the official test
split, with a seeded generator, and stored as 28x28 grey PNG images with named labels. The images come from a Debian
package, which the script opens with ``dpkg-deb``:

    apt-get download dataset-fashion-mnist
    python recipes/demo/make_data.py --fashion_mnist_archive dataset-fashion-mnist_*_all.deb \\
        --output_dir recipes/demo/data

The same seed and the same library versions give the same bytes.
"""

import gzip
import io
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import HfArgumentParser

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FOLDER = "./usr/share/datasets/fashion-mnist"


@dataclass
class DataArguments:
    """Paths to read and write."""

    fashion_mnist_archive: str = field(metadata={"help": "the .deb that `apt-get download` fetches"})
    output_dir: str = field(metadata={"help": "folder of train.parquet and test.parquet"})
    train_images_per_class: int = field(default=800)
    test_images_per_class: int = field(default=200)
    seed: int = field(default=0)


def read_idx(tar: tarfile.TarFile, name: str) -> np.ndarray:
    """The array of one gzipped IDX file: a magic number, the big-endian sizes, the bytes."""
    member = tar.extractfile(f"{FOLDER}/{name}.gz")
    assert member is not None  # a regular file
    raw = gzip.decompress(member.read())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def png(image: np.ndarray) -> bytes:
    """The image as an optimised PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def subset(images: np.ndarray, labels: np.ndarray, per_class: int, rng: np.random.Generator) -> Dataset:
    """`per_class` images of every class, without replacement, in shuffled order."""
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(len(NAMES))]
    indices = rng.permutation(np.concatenate(chosen))
    rows = {"image": [{"bytes": png(images[i]), "path": None} for i in indices], "label": labels[indices].tolist()}
    return Dataset.from_dict(rows, features=Features({"image": Image(mode="L"), "label": ClassLabel(names=NAMES)}))


def main() -> None:
    """Read the package, draw the two subsets and write them."""
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses()
    command = ["dpkg-deb", "--fsys-tarfile", args.fashion_mnist_archive]
    archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    splits = {"train": ("train", args.train_images_per_class), "test": ("t10k", args.test_images_per_class)}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for split, (prefix, per_class) in splits.items():
            images = read_idx(tar, f"{prefix}-images-idx3-ubyte")
            labels = read_idx(tar, f"{prefix}-labels-idx1-ubyte")
            subset(images, labels, per_class, rng).to_parquet(output / f"{split}.parquet")


if __name__ == "__main__":
    main()
