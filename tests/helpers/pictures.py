"""Small pictures, and data sets of them."""

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from PIL import Image


def picture(value: int, mode: str = "RGB", size: tuple[int, int] = (10, 8)) -> Image.Image:
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def in_memory(labels: list, feature=None, image: str = "image", label: str = "label") -> Dataset:
    features = Features({image: datasets.Image(), label: feature or Value("string")})
    return Dataset.from_dict({image: [picture(i) for i in range(len(labels))], label: labels}, features=features)


def write_images(folder, count: int, classes=("cat", "dog")) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(i).save(folder / name / f"{i}.png")


def pixels(split: Dataset) -> list[bytes]:
    return [image.tobytes() for image in split["image"]]
