"""Splits: which rows of a stored data set train, validate and test, chosen by seed and published by row number."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image

from .images import CorruptImageError


class StoredRows(NamedTuple):
    """Where the images of a split come from.

    Args:
        split: split of the stored data set.
        rows: row numbers in it, int64 [n]; image i of the split is `rows[i]`.
    """

    split: str
    rows: np.ndarray

    def place(self, index: int) -> str:
        """Split and row of an image, as in `train[17]`."""
        return f"{self.split}[{self.rows[index]}]"

    def name_corrupt(self, index: int, error: Exception) -> CorruptImageError:
        """An error that says by split and row which image cannot be used."""
        return CorruptImageError(
            f"The image {self.place(index)} cannot be used ({error}); repair or remove it, or leave out all such "
            "images with corrupt_images='skip'."
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the row numbers, as little-endian 64-bit integers, in hexadecimal digits."""
        return hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()


class TransferSplits(DatasetDict):
    """The splits `train`, `validation` and `test`, and which rows of the stored data set they hold.

    Args:
        splits: the data sets.
        rows: where the images of each come from, in the same order.
    """

    def __init__(self, splits: Mapping[str, Dataset], rows: Mapping[str, StoredRows]) -> None:
        super().__init__(splits)
        self.rows = dict(rows)

    def view(self, name: str, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> SplitView:
        """A split seen through a transform of `ImageTransforms`, for a trainer."""
        return SplitView(self[name].with_transform(transform), self.rows[name])

    def digests(self) -> dict[str, str]:
        """A digest of the row numbers of each split: two runs with the same digests saw the same images."""
        return {name: f"{rows.split} {rows.digest}" for name, rows in self.rows.items()}

    def save_rows(self, path: str | Path) -> None:
        """Publish the row numbers as JSON: `{"train": {"split": "train", "rows": [...], "sha256": ...}, ...}`."""
        content = {
            name: {"split": rows.split, "sha256": rows.digest, "rows": rows.rows.tolist()}
            for name, rows in self.rows.items()
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")


class SplitView(torch.utils.data.Dataset[dict[str, Any]]):
    """A split whose images that cannot be read are named by split and row.

    Args:
        split: data set with a transform.
        rows: where its images come from.
    """

    def __init__(self, split: Dataset, rows: StoredRows) -> None:
        self.split = split
        self.rows = rows

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.split[index]
        except CorruptImageError as error:
            raise self.rows.name_corrupt(index, error) from error

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several rows at once, as PyTorch's loader asks for them."""
        try:
            return self.split.__getitems__(indices)
        except CorruptImageError:
            return [self[index] for index in indices]

    def content_digest(self) -> str:
        """Return the SHA-256 of all labels and of the stored bytes of up to 16 images, spread over the split."""
        stored = self.split.with_format(None).cast_column("image", Image(decode=False))
        digest = hashlib.sha256(np.asarray(stored["label"][:], dtype="<i8").tobytes())
        for row in np.unique(np.linspace(0, len(self) - 1, 16).astype(int)).tolist():
            digest.update(_file_bytes(stored[row]["image"]))
        return digest.hexdigest()


class StoredImage(NamedTuple):
    """An image of a stored data set.

    Args:
        split: our split: `train`, `validation` or `test`.
        place: split and row of the stored data set, as in `train[17]`.
    """

    split: str
    place: str


def find_duplicates(splits: TransferSplits, num_proc: int | None = None) -> list[list[StoredImage]]:
    """Find images that are stored more than once, within a split or in several.

    Compares SHA-256 digests of the stored files, so that nothing is decoded: copies that were encoded or resized
    anew are not found. The digests are cached by `datasets`.

    Args:
        splits: what `load_transfer_dataset` gives.
        num_proc: processes to read with.

    Returns:
        For each image that is stored more than once, all its places.
    """
    places: dict[str, list[StoredImage]] = defaultdict(list)
    for name, split in splits.items():
        stored = split.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
        digests = stored.map(
            _digests, batched=True, batch_size=100, remove_columns="image", num_proc=num_proc, desc="Hashing images"
        )
        for index, digest in enumerate(digests["digest"][:]):
            places[digest].append(StoredImage(name, splits.rows[name].place(index)))
    return [copies for copies in places.values() if len(copies) > 1]


def _digests(batch: Mapping[str, Any]) -> dict[str, list[str]]:
    return {"digest": [hashlib.sha256(_file_bytes(stored)).hexdigest() for stored in batch["image"]]}


def _file_bytes(stored: Mapping[str, Any] | None) -> bytes:
    if stored is None:
        return b""
    return Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]


def shared_between_splits(duplicates: Sequence[Sequence[StoredImage]]) -> list[Sequence[StoredImage]]:
    """Those duplicates of `find_duplicates` whose copies are in different splits."""
    return [copies for copies in duplicates if len({copy.split for copy in copies}) > 1]


@dataclass(frozen=True)
class Part:
    """Some rows of a stored split."""

    data: Dataset
    stored: StoredRows

    def select(self, indices: np.ndarray) -> Part:
        """Of these rows, some, in the order in which they are stored."""
        indices = np.sort(indices)
        return Part(self.data.select(indices), StoredRows(self.stored.split, self.stored.rows[indices]))


def listed(names: Any) -> str:
    """Join names with commas, for messages."""
    return ", ".join(str(name) for name in names)
