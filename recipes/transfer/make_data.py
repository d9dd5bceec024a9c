"""Write scikit-learn's handwritten digits as parquet files, a small target task.

    python recipes/transfer/make_data.py --output_dir recipes/transfer/data/digits

The images (UCI's "Optical Recognition of Handwritten Digits", CC BY 4.0) come with scikit-learn, so nothing is
downloaded. The same seed and the same library versions give the same bytes.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import HfArgumentParser


@dataclass
class DigitsArguments:
    """Path to write."""

    output_dir: str = field(metadata={"help": "folder of train.parquet and test.parquet"})
    test_images: int = field(default=500, metadata={"help": "of 1,797 images, drawn evenly over the classes"})
    seed: int = field(default=0)


def png(image: np.ndarray) -> bytes:
    """An image [8, 8] of grey values from 0 to 16 as an optimised PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray((image * 255 / 16).round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Split the images and write both parts."""
    (args,) = HfArgumentParser(DigitsArguments).parse_args_into_dataclasses()
    digits, output = load_digits(), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=args.test_images, stratify=digits.target, random_state=args.seed)
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=[str(name) for name in range(10)])})
    for split, chosen in (("train", np.sort(train)), ("test", np.sort(test))):
        images = [{"bytes": png(digits.images[row]), "path": None} for row in chosen]
        labels = digits.target[chosen].tolist()
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            output / f"{split}.parquet"
        )


if __name__ == "__main__":
    main()
