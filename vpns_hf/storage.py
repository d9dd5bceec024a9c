"""Packed safetensors: the kept weights and a coded mask in place of every masked tensor, all else as it is.

The file is plain safetensors and any of its readers opens it. A masked tensor `name` is stored as `name`, its kept
values in row-major order, and `name:mask`, the bytes of its mask in the shortest of [`CODINGS`]. The metadata holds
what the caller gave and two keys of ours: the packing version, and a JSON object with the shape and coding of every
masked tensor.

Reading trusts nothing: what the header says is checked against the size of the file, and what a payload decodes to
against the header, before memory is taken for it.
"""

from __future__ import annotations

import json
import math
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

VERSION_KEY = "vpns_hf_packing"
VERSION = "1"
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
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_MAX_HEADER = 2**24
_MAX_DIMS = 64
# Masks and values are walked in pieces of this many entries, so that index arrays stay small and in the cache.
_CHUNK = 2**18


class PackedFormatError(ValueError):
    """A file that is no sound packed file, or one of a newer version; the message names the file and the tensor."""


def save_packed(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors to one safetensors file, those with a mask packed.

    Tensor by tensor: beyond a copy of one tensor where it is not contiguous or not on the CPU, the memory taken is
    less than one byte an entry of the largest mask. The file appears at `path` complete or not at all.

    Args:
        path: the file to write; replaced if it is there.
        tensors: dense tensors of any shape, memory format and device by name. Values are kept bit for bit, memory
            formats are not. Tensors that share memory are stored once each.
        masks: bool tensors, True where the entry is kept, for some of these names and of the same shapes.
        metadata: free text by key; it is not coded.

    Raises:
        ValueError: a pruned entry is anything but +0.0 (-0.0 would not come back either), a mask fits no tensor, or a
            name, dtype or key cannot be stored. Nothing is written then.
        OSError: the file cannot be written, as on a full disk; what was at `path` before is untouched.
    """
    _check_savable(tensors, masks, metadata)
    temporary = Path(path).with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write(file, tensors, masks, metadata)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_packed(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Read back what [`save_packed`] wrote, bit for bit, one tensor at a time.

    Returns:
        The dense tensors with the zeros in place, the bool masks, and the metadata, each in the order in which it was
        given; contiguous and on the CPU.

    Raises:
        PackedFormatError: the file was cut short, changed, made by hand, or packed by a newer version.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        with _blaming(f"{os.fspath(path)} is no packed file of vpns_hf that can be read:"):
            header = _read_header(file)
            layout = _read_layout(header)
        tensors, masks = {}, {}
        for name in layout.names:
            with _blaming(f"{os.fspath(path)} is damaged: tensor {name!r}"):
                if name in layout.packed:
                    tensors[name], masks[name] = _read_packed(file, header, name, layout.packed[name])
                else:
                    entry = header.entries[name]
                    tensors[name] = _as_tensor(_read_bits(file, entry), entry.dtype, entry.shape)
    return tensors, {name: masks[name] for name in layout.packed}, layout.metadata


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether this is a safetensors file that claims to be packed, of any version; reads its header alone.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            header = _parse_json(_read_header_bytes(file))
        except ValueError:
            return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and VERSION_KEY in metadata


# Codings of a mask ---------------------------------------------------------------------------------------------------


class Coding(NamedTuple):
    """One way to write a mask as bytes.

    `encode(mask)` takes a 1-D bool array and returns the payload, or None where the coding does not apply.
    `decode(payload, total, kept)` returns the 1-D bool array of `total` entries and raises ValueError where the
    payload is no such mask. It must not take memory that the length of the payload does not justify; the caller counts
    the kept entries.
    """

    encode: Callable[[np.ndarray], bytes | None]
    decode: Callable[[bytes, int, int], np.ndarray]


def _encode_dense(mask: np.ndarray) -> bytes | None:
    return b"" if mask.all() else None


def _decode_dense(payload: bytes, total: int, kept: int) -> np.ndarray:
    if payload or kept != total:
        raise ValueError("is stored dense, but it has pruned entries.")
    return np.ones(total, dtype=np.bool_)


def _encode_bits(mask: np.ndarray) -> bytes:
    return np.packbits(mask).tobytes()


def _decode_bits(payload: bytes, total: int, kept: int) -> np.ndarray:
    if len(payload) != (total + 7) // 8:
        raise ValueError(f"has a mask of {len(payload)} bytes, which does not fit its {total} entries.")
    if total % 8 and payload[-1] & (0xFF >> total % 8):
        raise ValueError("has a mask with more bits than entries.")
    return np.unpackbits(np.frombuffer(payload, dtype=np.uint8), count=total).view(np.bool_)


def _encode_huffman(mask: np.ndarray) -> bytes:
    return _deflate([np.packbits(mask)])


def _decode_huffman(payload: bytes, total: int, kept: int) -> np.ndarray:
    return _decode_bits(_inflate(payload, (total + 7) // 8), total, kept)


def _encode_gaps(mask: np.ndarray) -> bytes | None:
    # Where more is kept, most gaps are 0 or 1 and a bit each would be less.
    return _deflate(_gaps(mask)) if 4 * np.count_nonzero(mask) <= mask.size else None


def _gaps(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Bytes that walk the mask: `b` < 255 steps over b pruned entries onto a kept one, 255 over that many pruned ones.

    The last, incomplete run of pruned entries is left out.
    """
    run = 0
    for start in range(0, mask.size, _CHUNK):
        chunk = mask[start : start + _CHUNK]
        kept = np.flatnonzero(chunk)
        if not kept.size:
            run += chunk.size
            continue
        gaps = np.diff(kept, prepend=-1 - run) - 1
        long = np.flatnonzero(gaps >= 255)
        full_steps = gaps[long] // 255
        gaps[long] -= 255 * full_steps
        yield np.insert(gaps.astype(np.uint8), np.repeat(long, full_steps), 255)
        run = chunk.size - 1 - int(kept[-1])
    yield np.full(run // 255, 255, dtype=np.uint8)


def _decode_gaps(payload: bytes, total: int, kept: int) -> np.ndarray:
    longest = min(kept + (total - kept) // 255, 8 * len(payload))
    steps = np.frombuffer(_inflate(payload, longest, exact=False), dtype=np.uint8)
    lands = steps != 255
    walked = int(steps.sum(dtype=np.int64)) + int(np.count_nonzero(lands))
    if not 0 <= total - walked < 255:
        raise ValueError(f"has a mask of {walked} entries and its shape has {total}.")
    mask, start = np.zeros(total, dtype=np.bool_), -1
    for piece in range(0, steps.size, _CHUNK):
        landing = lands[piece : piece + _CHUNK]
        ends = np.cumsum(steps[piece : piece + _CHUNK] + landing.view(np.uint8), dtype=np.int64)
        ends += start
        mask[ends[landing]] = True
        start = int(ends[-1])
    return mask


def _deflate(pieces: list[np.ndarray] | Iterator[np.ndarray]) -> bytes:
    # Masks do not repeat, so matches are not looked for; in larger blocks (memLevel 9) the tables of codes cost less.
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join([*map(stream.compress, pieces), stream.flush()])  # type: ignore[arg-type]


def _inflate(payload: bytes, size: int, exact: bool = True) -> bytes:
    """The bytes of a deflated payload: `size`, or at most that unless `exact`; never takes memory for more."""
    if exact and size > 8 * len(payload):
        raise ValueError(f"has a mask of {len(payload)} coded bytes, too few for the {size} that they stand for.")
    stream = zlib.decompressobj()
    decoded = stream.decompress(payload, size + 1)
    if len(decoded) > size:
        raise ValueError(f"has a mask that decodes to more than its {size} bytes.")
    if not stream.eof or (exact and len(decoded) < size):
        raise ValueError("has a coded mask that is cut short.")
    if stream.unused_data:
        raise ValueError("has bytes behind its coded mask.")
    return decoded


# From the fastest to decode to the slowest: the first of the shortest is taken.
CODINGS = {
    "dense": Coding(_encode_dense, _decode_dense),
    "bits": Coding(_encode_bits, _decode_bits),
    "huffman": Coding(_encode_huffman, _decode_huffman),
    "gaps": Coding(_encode_gaps, _decode_gaps),
}


def _shortest_coding(mask: np.ndarray) -> tuple[str, bytes]:
    payloads = ((name, coding.encode(mask)) for name, coding in CODINGS.items())
    return min(((name, payload) for name, payload in payloads if payload is not None), key=lambda item: len(item[1]))


# Writing -------------------------------------------------------------------------------------------------------------


def _check_savable(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    for name, tensor in tensors.items():
        if name == "__metadata__" or name.endswith(MASK_SUFFIX):
            raise ValueError(f"No tensor can be stored as {name!r}: the file format takes that name itself.")
        if tensor.dtype not in _DTYPE_CODES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name!r} cannot be stored: it is {tensor.dtype}, {tensor.layout}, on {tensor.device}.")
    for name, mask in masks.items():
        if name not in tensors:
            raise ValueError(f"There is a mask of {name!r}, but no tensor of that name.")
        if mask.dtype != torch.bool or mask.shape != (shape := tensors[name].shape):
            raise ValueError(
                f"The mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
                f"{tuple(shape)}."
            )
    for key, text in metadata.items():
        if key in (VERSION_KEY, LAYOUT_KEY) or (key == "format" and text != "pt") or not isinstance(text, str):
            raise ValueError(
                f"The metadata {key!r} cannot be {text!r}: values are text, and {VERSION_KEY!r}, {LAYOUT_KEY!r} and "
                "'format' are set by the packing itself."
            )


def _flat_bits(tensor: Tensor) -> np.ndarray:
    """The entries in row-major order as unsigned integers of their size; shares memory where it can."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _flat_mask(mask: Tensor) -> np.ndarray:
    return mask.detach().cpu().contiguous().view(-1).numpy()


class _Span(NamedTuple):
    start: int
    stop: int


def _write(
    file: BinaryIO, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    kept = {name: int(np.count_nonzero(_flat_mask(mask))) for name, mask in masks.items()}

    def header(spans: Mapping[str, _Span], codings: Mapping[str, str]) -> bytes:
        return _header_bytes(tensors, kept, metadata, spans, codings)

    # The payloads are only known once written, so the header goes into room left for the longest one there could be.
    size = sum(tensor.nbytes + tensor.numel() for tensor in tensors.values())
    blobs = [*tensors, *(name + MASK_SUFFIX for name in masks)]
    room = len(header(dict.fromkeys(blobs, _Span(size, size)), dict.fromkeys(masks, max(CODINGS, key=len))))
    room += -room % 8
    if room > _MAX_HEADER:
        raise ValueError(f"The names and metadata take {room} bytes; a packed file has room for {_MAX_HEADER}.")
    spans, codings = dict[str, _Span](), dict[str, str]()
    data_start = file.seek(8 + room)
    # Large items first keeps every tensor aligned to its own item size, which readers that map the file rely on.
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
        start = file.tell()
        _write_tensor(file, name, tensors[name], masks.get(name))
        spans[name] = _Span(start - data_start, file.tell() - data_start)
    for name, mask in masks.items():
        start = file.tell()
        codings[name], payload = _shortest_coding(_flat_mask(mask))
        file.write(payload)
        spans[name + MASK_SUFFIX] = _Span(start - data_start, file.tell() - data_start)
    file.seek(0)
    file.write(room.to_bytes(8, "little") + header(spans, codings).ljust(room))


def _header_bytes(
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, int],
    metadata: Mapping[str, str],
    spans: Mapping[str, _Span],
    codings: Mapping[str, str],
) -> bytes:
    packed = {name: {"coding": codings[name], "shape": list(tensors[name].shape)} for name in kept}
    layout = json.dumps({"metadata": list(metadata), "packed": packed}, ensure_ascii=False, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, VERSION_KEY: VERSION, LAYOUT_KEY: layout}}
    for name, tensor in tensors.items():
        shape = [kept[name]] if name in kept else list(tensor.shape)
        header[name] = {"dtype": _DTYPE_CODES[tensor.dtype], "shape": shape, "data_offsets": spans[name]}
    for name in kept:
        span = spans[name + MASK_SUFFIX]
        header[name + MASK_SUFFIX] = {"dtype": "U8", "shape": [span.stop - span.start], "data_offsets": span}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor, mask: Tensor | None) -> None:
    bits = _flat_bits(tensor)
    if mask is None:
        file.write(bits.data)
        return
    keep = _flat_mask(mask)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        kept = np.compress(keep[start : start + _CHUNK], chunk)
        if np.count_nonzero(chunk) != np.count_nonzero(kept):
            raise ValueError(
                f"Tensor {name!r} is not +0.0 in every entry that its mask prunes, and what is there would be lost; "
                "write zeros first with `tensor.masked_fill_(~mask, 0)`."
            )
        file.write(kept.data)


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """Where a stored array lies: `[start, stop)` in the file, checked to hold exactly `shape` items of `dtype`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Header:
    metadata: dict[str, str]
    entries: dict[str, _Entry]


@dataclass(frozen=True)
class _Packed:
    """What the layout says of a masked tensor."""

    coding: Coding
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    names: list[str]
    packed: dict[str, _Packed]
    metadata: dict[str, str]


@contextmanager
def _blaming(subject: str) -> Iterator[None]:
    """Turn what the checks raise into the one exception of this module, its message begun with `subject`."""
    try:
        yield
    except (ValueError, zlib.error) as error:
        raise PackedFormatError(f"{subject} {error}") from error


def _parse_json(text: bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names {name!r} twice.")
    return found


def _read_header_bytes(file: BinaryIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("its header is cut short or too long.")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("its header is cut short.")
    return text


def _read_header(file: BinaryIO) -> _Header:
    claims = _parse_json(_read_header_bytes(file), _without_duplicates)
    metadata = claims.pop("__metadata__", None) if isinstance(claims, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its header has no metadata.")
    if metadata.get(VERSION_KEY) != VERSION:
        raise ValueError(
            f"its packing version is {metadata.get(VERSION_KEY)!r} and this release reads {VERSION!r}; upgrade "
            "vpns_hf, as with `pip install -U vpns-hf`."
        )
    data_start, file_size = file.tell(), os.fstat(file.fileno()).st_size
    entries = {name: _checked_entry(name, claim, data_start) for name, claim in claims.items()}
    _check_coverage(entries, data_start, file_size)
    return _Header(metadata, entries)


def _checked_entry(name: str, claim: Any, data_start: int) -> _Entry:
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
    return _Entry(dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _is_size(number: Any) -> bool:
    # Not isinstance: True would pass as 1.
    return type(number) is int and 0 <= number < 2**63


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise ValueError(f"the shape of tensor {name!r} is none.")
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError(f"the shape of tensor {name!r} is too large.")
    return tuple(shape)


def _check_coverage(entries: Mapping[str, _Entry], data_start: int, file_size: int) -> None:
    """The arrays must fill the file: no gap, no overlap, nothing behind them and nothing cut off."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise ValueError(f"the bytes of tensor {name!r} do not follow those before them.")
        position = entry.stop
    if position != file_size:
        raise ValueError(f"it has {file_size} bytes and its header describes {position}.")


def _read_layout(header: _Header) -> _Layout:
    layout = _parse_json(header.metadata.get(LAYOUT_KEY, "").encode(), _without_duplicates)
    if not isinstance(layout, dict) or set(layout) != {"metadata", "packed"} or not isinstance(layout["packed"], dict):
        raise ValueError(f"its {LAYOUT_KEY} is malformed.")
    keys = layout["metadata"]
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in header.metadata for key in keys):
        raise ValueError(f"its {LAYOUT_KEY} lists metadata that is not there.")
    packed = {name: _checked_packed(name, claim, header) for name, claim in layout["packed"].items()}
    payloads = {name + MASK_SUFFIX for name in packed}
    names = [name for name in header.entries if name not in payloads]
    if unknown := [name for name in names if name.endswith(MASK_SUFFIX)]:
        raise ValueError(f"{unknown[0]!r} is a mask of no tensor.")
    return _Layout(names, packed, {key: header.metadata[key] for key in keys})


def _checked_packed(name: str, claim: Any, header: _Header) -> _Packed:
    values, payload = header.entries.get(name), header.entries.get(name + MASK_SUFFIX)
    if values is None or payload is None:
        raise ValueError(f"tensor {name!r} is said to be packed, but its values or its mask are missing.")
    if not isinstance(claim, dict) or set(claim) != {"coding", "shape"}:
        raise ValueError(f"its {LAYOUT_KEY} describes tensor {name!r} wrongly.")
    coding = CODINGS.get(claim["coding"]) if isinstance(claim["coding"], str) else None
    if coding is None:
        raise ValueError(f"tensor {name!r} has a mask in an unknown coding.")
    shape = _checked_shape(name, claim["shape"])
    if len(values.shape) != 1 or len(payload.shape) != 1 or payload.dtype != torch.uint8:
        raise ValueError(f"tensor {name!r} is said to be packed, but its values or its mask are no vectors.")
    if values.shape[0] > math.prod(shape):
        raise ValueError(f"tensor {name!r} has more values than entries.")
    return _Packed(coding, shape)


def _read_bits(file: BinaryIO, entry: _Entry) -> np.ndarray:
    """The items of a stored array, in one dimension, as unsigned integers of their size."""
    data = np.empty(entry.stop - entry.start, dtype=np.uint8)
    file.seek(entry.start)
    if file.readinto(data.data) != data.size:  # type: ignore[attr-defined]
        raise ValueError("is cut short.")
    if entry.dtype == torch.bool and (data > 1).any():
        raise ValueError("has truth values that are neither 0 nor 1.")
    return data.view(f"u{entry.dtype.itemsize}")


def _as_tensor(bits: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(bits).view(dtype).view(shape)


def _read_packed(file: BinaryIO, header: _Header, name: str, packed: _Packed) -> tuple[Tensor, Tensor]:
    entry = header.entries[name]
    total, kept = math.prod(packed.shape), entry.shape[0]
    payload = _read_bits(file, header.entries[name + MASK_SUFFIX]).tobytes()
    mask = packed.coding.decode(payload, total, kept)
    if np.count_nonzero(mask) != kept:
        raise ValueError(f"has {kept} values and a mask that keeps {np.count_nonzero(mask)}.")
    values = _read_bits(file, entry)
    dense = values if kept == total else _scatter(values, mask)
    return _as_tensor(dense, entry.dtype, packed.shape), _as_tensor(mask, torch.bool, packed.shape)


def _scatter(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An array with the values in order where the mask is True and zeros elsewhere."""
    dense, used = np.zeros(mask.size, dtype=values.dtype), 0
    for start in range(0, mask.size, _CHUNK):
        kept = np.flatnonzero(mask[start : start + _CHUNK])
        dense[start : start + _CHUNK][kept] = values[used : used + kept.size]
        used += kept.size
    return dense
