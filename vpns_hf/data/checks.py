"""Check the arguments by which a data set is loaded."""

from __future__ import annotations

from ..values import BETWEEN_0_AND_1, FLAG, NAME, PATH, SEED, SHARE, TEXT, Check, count, either, one_of, optional
from .corrupt import CORRUPT_IMAGES

_NAME = optional(NAME)
LOADING: dict[str, Check] = {
    "name": _NAME,
    "image_column": _NAME,
    "label_column": _NAME,
    "train_split": _NAME,
    "validation_split": _NAME,
    "test_split": _NAME,
    "validation_fraction": BETWEEN_0_AND_1,
    "shots": optional(count()),
    "fraction": optional(SHARE),
    "seed": SEED,
    "corrupt_images": one_of(CORRUPT_IMAGES),
    "stream_images": optional(count()),
    "revision": _NAME,
    "cache_dir": optional(PATH),
    "token": optional(either(FLAG, TEXT)),
    "num_proc": optional(count(1, 1024)),
}
_TRAINING_ONLY = ("shots", "fraction", "corrupt_images", "stream_images", "num_proc")
EVALUATION: dict[str, Check] = {
    "split": one_of(("train", "validation", "test")),
    **{name: check for name, check in LOADING.items() if name not in _TRAINING_ONLY},
}
