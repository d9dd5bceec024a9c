"""Record which rows of a stored data set train, validate and test; find images in several splits."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image

from .images import CorruptImageError


class StoredRows(NamedTuple):
    """Record the rows of the stored data set that a split holds.

    Args:
        split: name of the stored split.
        rows: row numbers in it, int64 [n]; image i of the split is `rows[i]`.
    """

    split: str
    rows: np.ndarray

    def place(self, index: int) -> str:
        """Format stored split and row of an image, as in `train[17]`."""
        return f"{self.split}[{self.rows[index]}]"

    def name_corrupt(self, index: int, error: Exception) -> CorruptImageError:
        """Build an error that names the unusable image by split and row."""
        return CorruptImageError(
            f"The image {self.place(index)} cannot be used ({error}); repair or remove it, or leave out all such "
            "images with corrupt_images='skip'."
        )

    @property
    def digest(self) -> str:
        """Hash the row numbers, as little-endian 64-bit integers: SHA-256 in hexadecimal digits."""
        return hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()


class TransferSplits(DatasetDict):
    """Hold the splits `train`, `validation` and `test` and their rows in the stored data set.

    Args:
        splits: data set of each split.
        rows: stored rows of each split, in the same order.
    """

    def __init__(self, splits: Mapping[str, Dataset], rows: Mapping[str, StoredRows]) -> None:
        super().__init__(splits)
        self.rows = dict(rows)

    def view(self, name: str, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> SplitView:
        """View a split through a transform of `ImageTransforms`, for a trainer."""
        return SplitView(self[name].with_transform(transform), self.rows[name])

    def digests(self) -> dict[str, str]:
        """Hash the row numbers of each split: two runs with the same digests saw the same images."""
        return {name: f"{rows.split} {rows.digest}" for name, rows in self.rows.items()}

    @cached_property
    def content_digests(self) -> dict[str, str]:
        """Hash the contents of each split, see [`SplitView.content_digest`]."""
        return {name: SplitView(split, self.rows[name]).content_digest() for name, split in self.items()}

    def save_rows(self, path: str | Path) -> None:
        """Write the row numbers as JSON: `{"train": {"split": "train", "rows": [...], "sha256": ...}, ...}`."""
        content = {
            name: {"split": rows.split, "sha256": rows.digest, "rows": rows.rows.tolist()}
            for name, rows in self.rows.items()
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")


class SplitView(torch.utils.data.Dataset[dict[str, Any]]):
    """View a split and name images that cannot be decoded by stored split and row.

    Args:
        split: data set with a transform.
        rows: stored rows of its images.
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
        """Get several rows at once, for PyTorch's loader."""
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
    """Locate an image of a stored data set.

    Args:
        split: our split: `train`, `validation` or `test`.
        place: stored split and row, as in `train[17]`.
    """

    split: str
    place: str


def find_duplicates(splits: TransferSplits, num_proc: int | None = None) -> list[list[StoredImage]]:
    """Find images that are stored more than once, within a split or in several.

    Compares SHA-256 digests of the stored files without decoding them: re-encoded or resized copies are not found.
    `datasets` caches the digests.

    Args:
        splits: result of `load_transfer_dataset`.
        num_proc: number of processes.

    Returns:
        One list per image that is stored more than once, of all its places.
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
    """Select the duplicates of `find_duplicates` whose copies are in different splits."""
    return [copies for copies in duplicates if len({copy.split for copy in copies}) > 1]


@dataclass(frozen=True)
class Part:
    """Hold some rows of a stored split."""

    data: Dataset
    stored: StoredRows

    def select(self, indices: np.ndarray) -> Part:
        """Select some of these rows, in stored order."""
        indices = np.sort(indices)
        return Part(self.data.select(indices), StoredRows(self.stored.split, self.stored.rows[indices]))


def listed(names: Any) -> str:
    """Join names with commas, for messages."""
    return ", ".join(str(name) for name in names)
