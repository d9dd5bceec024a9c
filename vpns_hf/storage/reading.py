"""Read packed safetensors files."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from .codings import CODINGS
from .header import (
    DTYPE_CODES,
    MASK_SUFFIX,
    VERSION_KEY,
    Checksum,
    Entry,
    blaming,
    read_header,
    read_header_bytes,
    read_layout,
)
from .writing import any_nan, threads

# Above the largest size that malloc may take from its own heap, where it would have to clear memory by hand.
_ARENA = 2**26


def load_packed(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Read back what [`save_packed`] wrote, bit for bit, one tensor at a time.

    Returns:
        The dense tensors with the zeros in place, the bool masks, and the metadata, each in the order in which it was
        given; contiguous and on the CPU.

    Raises:
        PackedFormatError: the file was cut short, changed, made by hand, or packed by a newer version.
        OSError: the file cannot be read.
    """
    with PackedFile(path) as file, ThreadPoolExecutor(threads()) as pool:
        found = dict(zip(file.names, pool.map(file.read, file.names), strict=True))
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    masks = {name: mask for name in file.masked if (mask := found[name][1]) is not None}
    return tensors, masks, file.metadata


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Return whether this is a safetensors file that claims to be packed, of any version; reads its header alone.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            header = json.loads(read_header_bytes(file))
        except (ValueError, RecursionError):
            return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and VERSION_KEY in metadata


class _Arena:
    """Zeroed arrays cut from large blocks, each freed with the last array in it.

    The system hands out pages of a large block many at a time; one by one, they cost more than the unpacking.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._rest = np.zeros(0, dtype=np.uint8)

    def zeros(self, count: int, itemsize: int) -> np.ndarray:
        """`count` zeros as unsigned integers of `itemsize` bytes."""
        size = count * itemsize
        aligned = size + -size % 64
        with self._lock:
            if aligned > self._rest.size:
                self._rest = np.zeros(max(aligned, _ARENA), dtype=np.uint8)
            taken, self._rest = self._rest[:size], self._rest[aligned:]
        return taken.view(f"u{itemsize}")


class StoredTensor(NamedTuple):
    """Position of a tensor in a packed file.

    Args:
        kept, total: entries that are stored, and all.
        bytes: of the values and the mask.
        coding: that of the mask, a key of `CODINGS`; `"raw"` where there is none.
    """

    kept: int
    total: int
    bytes: int
    coding: str


class PackedFile:
    """Open packed file, its header read and checked; a context manager.

    Tensors are read one at a time, also from several threads.

    Args:
        path: a file that [`save_packed`] wrote.

    Attributes:
        names: the tensors, in the order in which they were given.
        masked: those of them that have a mask, in the order of the masks.
        metadata: what was given.

    Raises:
        PackedFormatError: the header was cut short, changed, made by hand, or written by a newer version.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = os.fspath(path)
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            with blaming(f"{self._path} is no packed file of vpns_hf that can be read:"):
                self._header = read_header(self._file)
                self._layout = read_layout(self._header)
        except BaseException:
            self._file.close()
            raise
        self._lock = Lock()
        # Apart, so that dropping all masks frees their memory.
        self._items, self._masks = _Arena(), _Arena()
        self.names, self.masked, self.metadata = self._layout.names, self._layout.packed.keys(), self._layout.metadata

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def stored_names(self) -> list[str]:
        """Return the names in the file, as any reader of safetensors sees them: a mask is an array of its own."""
        return list(self._header.entries)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor, unpacked."""
        packed = self._layout.packed.get(name)
        return torch.Size(packed.shape if packed else self._header.entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._header.entries[name].dtype

    def stored(self, name: str) -> StoredTensor:
        """Say how a tensor lies in the file, without reading it."""
        entry, packed = self._header.entries[name], self._layout.packed.get(name)
        size, total = entry.stop - entry.start, math.prod(self.shape(name))
        if packed is None:
            return StoredTensor(total, total, size, "raw")
        mask = self._header.entries[name + MASK_SUFFIX]
        return StoredTensor(entry.shape[0], total, size + mask.stop - mask.start, packed.coding)

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Read a tensor, dense, contiguous and on the CPU, and its mask, or None where it has no mask.

        Raises:
            PackedFormatError: what is stored is not what the header says.
        """
        with blaming(f"{self._path} is damaged: tensor {name!r}"):
            try:
                return self._read(name)
            except MemoryError:
                raise ValueError(f"has the shape {tuple(self.shape(name))}, for which there is no memory.") from None

    def _read(self, name: str) -> tuple[Tensor, Tensor | None]:
        entry = self._header.entries[name]
        checksum = Checksum(name, DTYPE_CODES[entry.dtype], list(entry.shape))
        if name not in self._layout.packed:
            items = self._read_items(entry, 0, math.prod(entry.shape))
            checksum.update(items.data)
            self._verify(name, checksum)
            return _as_tensor(items, entry.dtype, entry.shape), None
        packed = self._layout.packed[name]
        coded = self._header.entries[name + MASK_SUFFIX]
        payload = self._read_items(coded, 0, coded.shape[0]).tobytes()
        mask_checksum = Checksum(name + MASK_SUFFIX, packed.coding, list(packed.shape))
        mask_checksum.update(payload)
        self._verify(name + MASK_SUFFIX, mask_checksum)
        total, kept = math.prod(packed.shape), entry.shape[0]
        pieces = CODINGS[packed.coding].decode(payload, total, kept)
        items, mask, used = self._items.zeros(total, entry.dtype.itemsize), self._masks.zeros(total, 1), 0
        for positions in pieces:
            values = self._read_items(entry, used, positions.size)
            checksum.update(values.data)
            if any_nan(values, entry.dtype):
                raise ValueError("has kept values that are NaN.")
            items[positions] = values
            mask[positions] = 1
            used += positions.size
        self._verify(name, checksum)
        return _as_tensor(items, entry.dtype, packed.shape), _as_tensor(mask, torch.bool, packed.shape)

    def _verify(self, stored_name: str, found: Checksum) -> None:
        # Files of version 1 have no checksums.
        if self._layout.checksums.get(stored_name, found.hexdigest()) != found.hexdigest():
            raise ValueError("does not have the checksum that it was written with; download or copy the file again.")

    def _read_items(self, entry: Entry, first: int, count: int) -> np.ndarray:
        """Items of a stored array from `first` on, as unsigned integers of their size."""
        size = entry.dtype.itemsize
        data = np.empty(count * size, dtype=np.uint8)
        with self._lock:
            self._file.seek(entry.start + first * size)
            length = self._file.readinto(data.data)
        if length != data.size:
            raise ValueError("is cut short.")
        if entry.dtype == torch.bool and (data > 1).any():
            raise ValueError("has truth values that are neither 0 nor 1.")
        return data.view(f"u{size}")


def _as_tensor(items: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # torch gives empty arrays strides of 0, which later views trip over.
    return torch.from_numpy(items).view(dtype).view(shape) if items.size else torch.empty(shape, dtype=dtype)
