"""Read and check the header of a packed safetensors file."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from .codings import CODINGS

VERSION_KEY = "vpns_hf_packing"
# What is written. Version 1 has no checksums.
VERSION = "2"
READABLE_VERSIONS = ("1", "2")
LAYOUT_KEY = "vpns_hf_layout"
MASK_SUFFIX = ":mask"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
MAX_HEADER = 2**24
_MAX_DIMS = 64


class PackedFormatError(ValueError):
    """File that is no sound packed file, or one of a newer version; the message names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """Position of a stored array: `[start, stop)` in the file, checked to hold exactly `shape` items of `dtype`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Header:
    metadata: dict[str, str]
    entries: dict[str, Entry]


@dataclass(frozen=True)
class _Packed:
    """Layout of a masked tensor."""

    coding: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    names: list[str]
    packed: dict[str, _Packed]
    metadata: dict[str, str]
    checksums: dict[str, str]


@contextmanager
def blaming(subject: str) -> Iterator[None]:
    """Turn what the checks raise into the one exception of this module, its message begun with `subject`."""
    try:
        yield
    except ValueError as error:
        raise PackedFormatError(f"{subject} {error}") from error


def parse_json(text: bytes, what: str) -> Any:
    """Parse a JSON document from outside.

    Args:
        text: the document.
        what: what it is, for the messages.

    Raises:
        ValueError: it is no JSON, or an object in it names a key twice.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"its {what} is no sound JSON.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names {name!r} twice.")
    return found


class Checksum:
    """CRC-32 of a stored array and of what the header says of it.

    It is there to notice damage and keeps out nobody who means harm, who would write a matching one whatever the
    function; so CRC-32 is taken, which finds every burst of up to 32 bits and is four times as fast as BLAKE2b.

    Args:
        description: name in the file, dtype and shape, which damage must not change either.
    """

    def __init__(self, *description: Any):
        self._value = zlib.crc32(json.dumps(description).encode())

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the array."""
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        """Eight hexadecimal digits."""
        return f"{self._value:08x}"


def read_header_bytes(file: BinaryIO) -> bytes:
    """Read the JSON header of a safetensors file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("its header is cut short or too long.")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("its header is cut short.")
    return text


def read_header(file: BinaryIO) -> _Header:
    """Read and check the header of a safetensors file."""
    claims = parse_json(read_header_bytes(file), "header")
    metadata = claims.pop("__metadata__", None) if isinstance(claims, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its header has no metadata.")
    if VERSION_KEY not in metadata:
        raise ValueError("it is an ordinary safetensors file, which nothing has packed.")
    if metadata[VERSION_KEY] not in READABLE_VERSIONS:
        raise ValueError(
            f"its packing version is {metadata[VERSION_KEY]!r} and this release reads "
            f"{' and '.join(READABLE_VERSIONS)}; "
            "upgrade vpns_hf, as with `pip install -U vpns-hf`."
        )
    data_start, file_size = file.tell(), os.fstat(file.fileno()).st_size
    entries = {name: _checked_entry(name, claim, data_start) for name, claim in claims.items()}
    _check_coverage(entries, data_start, file_size)
    return _Header(metadata, entries)


def _checked_entry(name: str, claim: Any, data_start: int) -> Entry:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header describes tensor {name!r} wrongly.")
    shape, offsets = _checked_shape(name, claim["shape"]), claim["data_offsets"]
    dtype = _DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name!r} has an unknown dtype.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"tensor {name!r} has no proper offsets.")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the bytes of tensor {name!r} do not fit its shape.")
    return Entry(dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _is_size(number: Any) -> bool:
    # Not isinstance: True would pass as 1.
    return type(number) is int and 0 <= number < 2**63


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise ValueError(f"tensor {name!r} has no proper shape.")
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError(f"tensor {name!r} has too large a shape.")
    return tuple(shape)


def _check_coverage(entries: Mapping[str, Entry], data_start: int, file_size: int) -> None:
    """Check that the arrays fill the file: no gap, no overlap, nothing behind them and nothing cut off."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise ValueError(f"the bytes of tensor {name!r} do not follow those before them.")
        position = entry.stop
    if position != file_size:
        raise ValueError(f"it has {file_size} bytes and its header describes {position}.")


def read_layout(header: _Header) -> _Layout:
    """Read and check the layout of the packed tensors in a header."""
    layout = parse_json(header.metadata.get(LAYOUT_KEY, "").encode(), LAYOUT_KEY)
    has_checksums = header.metadata[VERSION_KEY] != "1"
    parts = {"metadata", "packed", "checksums"} if has_checksums else {"metadata", "packed"}
    if not isinstance(layout, dict) or set(layout) != parts or not isinstance(layout["packed"], dict):
        raise ValueError(f"its {LAYOUT_KEY} is malformed.")
    keys = layout["metadata"]
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in header.metadata for key in keys):
        raise ValueError(f"its {LAYOUT_KEY} lists metadata that is not there.")
    packed = {name: _checked_packed(name, claim, header) for name, claim in layout["packed"].items()}
    payloads = {name + MASK_SUFFIX for name in packed}
    names = [name for name in header.entries if name not in payloads]
    if unknown := [name for name in names if name.endswith(MASK_SUFFIX)]:
        raise ValueError(f"{unknown[0]!r} is a mask of no tensor.")
    checksums = layout["checksums"] if has_checksums else {}
    if has_checksums and (not isinstance(checksums, dict) or set(checksums) != set(header.entries)):
        raise ValueError(f"its {LAYOUT_KEY} does not have one checksum for each array.")
    return _Layout(names, packed, {key: header.metadata[key] for key in keys}, checksums)


def _checked_packed(name: str, claim: Any, header: _Header) -> _Packed:
    values, payload = header.entries.get(name), header.entries.get(name + MASK_SUFFIX)
    if values is None or payload is None or name.endswith(MASK_SUFFIX):
        raise ValueError(f"tensor {name!r} is said to be packed, but its values or its mask are missing.")
    if not isinstance(claim, dict) or set(claim) != {"coding", "shape"}:
        raise ValueError(f"its {LAYOUT_KEY} describes tensor {name!r} wrongly.")
    coding = claim["coding"]
    if not isinstance(coding, str) or coding not in CODINGS:
        raise ValueError(f"tensor {name!r} has a mask in an unknown coding.")
    shape = _checked_shape(name, claim["shape"])
    if len(values.shape) != 1 or len(payload.shape) != 1 or payload.dtype != torch.uint8:
        raise ValueError(f"tensor {name!r} is said to be packed, but its values or its mask are no vectors.")
    if values.shape[0] > math.prod(shape):
        raise ValueError(f"tensor {name!r} has more values than entries.")
    return _Packed(coding, shape)
