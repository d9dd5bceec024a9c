"""Packed safetensors: the kept weights and a coded mask in place of every masked tensor, all else as it is.

The file is plain safetensors and any of its readers opens it. A masked tensor `name` is stored as `name`, its kept
values in row-major order, and `name:mask`, the bytes of its mask in the shortest of [`CODINGS`]. The metadata holds
what the caller gave and two keys of ours: the packing version, and a JSON object with the shape and coding of every
masked tensor.

Reading trusts nothing: what the header says is checked against the size of the file, and what a payload decodes to
against the header, before memory is taken for it. Kept values of a masked tensor are never NaN, neither written nor
read: a weight that was kept and is no number comes from a run that diverged or from a damaged file.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Self

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
# Bytes that zlib, given most memory, codes with one table, and what a table takes.
_BLOCK, _TABLE = 2**15, 80
# Each takes up to a byte for every entry of the mask that it packs or unpacks.
_MAX_THREADS = 8
# Above the largest size that malloc may take from its own heap, where it would have to clear memory by hand.
_ARENA = 2**26


class PackedFormatError(ValueError):
    """A file that is no sound packed file, or one of a newer version; the message names the file and the tensor."""


def save_packed(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> dict[str, int]:
    """Write tensors to one safetensors file, those with a mask packed.

    Tensor by tensor: the memory taken is that of the largest tensor at most, and as much again where it has to be
    copied because it is not contiguous or not on the CPU. The file appears at `path` complete or not at all.

    Args:
        path: the file to write; replaced if it is there.
        tensors: dense tensors of any shape, memory format and device by name. Values come back bit for bit, but for
            -0.0 in a pruned entry, which comes back as 0.0; memory formats do not. Tensors that share memory are
            stored once each.
        masks: bool tensors, True where the entry is kept, for some of these names and of the same shapes.
        metadata: free text by key; it is not coded.

    Returns:
        The bytes of every stored array, by its name in the file.

    Raises:
        ValueError: a pruned entry is not zero, a kept one is NaN, a mask fits no tensor, or a name, dtype or key
            cannot be stored. Nothing is written then.
        OSError: the file cannot be written, as on a full disk; what was at `path` before is untouched.
    """
    _check_savable(tensors, masks, metadata)
    temporary = Path(path).with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            sizes = _write(file, tensors, masks, metadata)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return sizes


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
    """Whether this is a safetensors file that claims to be packed, of any version; reads its header alone.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            header = json.loads(_read_header_bytes(file))
        except (ValueError, RecursionError):
            return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and VERSION_KEY in metadata


def largest_packed_size(tensor: Tensor, mask: Tensor | None) -> int:
    """Bytes that a tensor takes at most in a packed file, its header aside."""
    if mask is None:
        return tensor.nbytes
    return int(mask.count_nonzero()) * tensor.itemsize + (mask.numel() + 7) // 8


def threads() -> int:
    """How many tensors are packed or unpacked at a time: as many as torch uses threads, up to 8."""
    # Nearly all of the time goes into zlib and numpy, which let other threads run.
    return min(torch.get_num_threads(), _MAX_THREADS)


# Codings of a mask ---------------------------------------------------------------------------------------------------


class Coding(NamedTuple):
    """One way to write a mask as bytes.

    `encode(mask, limit)` takes a 1-D bool array and returns the payload, or None where that does not apply or where an
    estimate says that the payload would take `limit` bytes or more.

    `decode(payload, total, kept)` returns the positions of the kept entries in order, in pieces. It raises ValueError
    before the first piece, not later, where the payload is no mask of `total` entries of which `kept` are True; until
    then it takes no memory that the length of the payload does not justify.
    """

    encode: Callable[[np.ndarray, int], bytes | None]
    decode: Callable[[bytes, int, int], Iterator[np.ndarray]]


def _encode_dense(mask: np.ndarray, limit: int) -> bytes | None:
    return b"" if mask.all() else None


def _decode_dense(payload: bytes, total: int, kept: int) -> Iterator[np.ndarray]:
    if payload or kept != total:
        raise ValueError("is stored dense, but it has pruned entries.")
    return (np.arange(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK))


def _encode_bits(mask: np.ndarray, limit: int) -> bytes | None:
    return np.packbits(mask).tobytes() if (mask.size + 7) // 8 < limit else None


def _decode_bits(payload: bytes, total: int, kept: int) -> Iterator[np.ndarray]:
    if len(payload) != (total + 7) // 8:
        raise ValueError(f"has a mask of {len(payload)} bytes, which does not fit its {total} entries.")
    if total % 8 and payload[-1] & (0xFF >> total % 8):
        raise ValueError("has a mask with more bits than entries.")
    packed = np.frombuffer(payload, dtype=np.uint8)
    _check_kept(int(np.bitwise_count(packed).sum(dtype=np.int64)), kept)
    return _bit_positions(packed)


def _bit_positions(packed: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, packed.size, _CHUNK // 8):
        bits = np.unpackbits(packed[start : start + _CHUNK // 8]).view(np.bool_)
        yield np.flatnonzero(bits) + 8 * start


def _check_kept(found: int, kept: int) -> None:
    if found != kept:
        raise ValueError(f"has {kept} values and a mask that keeps {found}.")


def _encode_huffman(mask: np.ndarray, limit: int) -> bytes | None:
    packed = np.packbits(mask)
    return _deflate([packed]) if _huffman_size(packed) < limit else None


def _huffman_size(data: np.ndarray) -> float:
    """About how many bytes [`_deflate`] makes of these bytes: their best Huffman code, and a table for each block."""
    weights = sorted(count for count in np.bincount(data).tolist() if count)
    bits = weights[0] if len(weights) == 1 else 0
    while len(weights) > 1:
        merged = heapq.heappop(weights) + heapq.heappop(weights)
        heapq.heappush(weights, merged)
        bits += merged
    return bits / 8 + _TABLE * math.ceil(data.size / _BLOCK)


def _decode_huffman(payload: bytes, total: int, kept: int) -> Iterator[np.ndarray]:
    size = (total + 7) // 8
    packed = _inflate(payload, size)
    if len(packed) != size:
        raise ValueError(f"has a mask that decodes to {len(packed)} of {size} bytes.")
    return _decode_bits(packed, total, kept)


def _encode_gaps(mask: np.ndarray, limit: int) -> bytes | None:
    # Where more is kept, a random mask is as short as bits, and those are faster.
    return _deflate(_gaps(mask)) if 6 * np.count_nonzero(mask) <= mask.size else None


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
        steps = gaps.astype(np.uint8)
        yield np.insert(steps, np.repeat(long, full_steps), 255) if long.size else steps
        run = chunk.size - 1 - int(kept[-1])
    yield np.full(run // 255, 255, dtype=np.uint8)


def _decode_gaps(payload: bytes, total: int, kept: int) -> Iterator[np.ndarray]:
    steps = np.frombuffer(_inflate(payload, kept + (total - kept) // 255), dtype=np.uint8)
    lands = steps != 255
    _check_kept(int(np.count_nonzero(lands)), kept)
    walked = int(steps.sum(dtype=np.int64)) + kept
    if not 0 <= total - walked < 255:
        raise ValueError(f"has a mask of {walked} entries and a shape of {total}.")
    return _gap_positions(steps, lands)


def _gap_positions(steps: np.ndarray, lands: np.ndarray) -> Iterator[np.ndarray]:
    last = -1
    for start in range(0, steps.size, _CHUNK):
        landing = lands[start : start + _CHUNK]
        ends = np.add(steps[start : start + _CHUNK], landing, dtype=np.int64)
        ends[0] += last
        np.cumsum(ends, out=ends)
        last = ends[-1]
        yield ends if landing.all() else ends[landing]


def _deflate(pieces: list[np.ndarray] | Iterator[np.ndarray]) -> bytes:
    # Masks do not repeat, so matches are not looked for; in larger blocks (memLevel 9) the tables of codes cost less.
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join([*map(stream.compress, pieces), stream.flush()])  # type: ignore[arg-type]


def _inflate(payload: bytes, limit: int) -> bytes:
    """The bytes that a payload of [`_deflate`] stands for, refused beyond `limit`.

    Huffman codes take a bit a byte or more. So a payload that stands for more than that was not written here, and the
    memory taken stays in proportion to the file.
    """
    limit = min(limit, 8 * len(payload))
    stream = zlib.decompressobj()
    try:
        decoded = stream.decompress(payload, limit + 1)
    except zlib.error as error:
        raise ValueError(f"has a mask that cannot be decoded ({error}).") from None
    if len(decoded) > limit:
        raise ValueError(f"has a mask of {len(payload)} bytes that decodes to more than {limit}.")
    if not stream.eof:
        raise ValueError("has a coded mask that is cut short.")
    if stream.unused_data:
        raise ValueError("has bytes behind its coded mask.")
    return decoded


# In the order in which they are tried: the gaps come first because the limit that they set often rules out the next.
CODINGS = {
    "dense": Coding(_encode_dense, _decode_dense),
    "gaps": Coding(_encode_gaps, _decode_gaps),
    "huffman": Coding(_encode_huffman, _decode_huffman),
    "bits": Coding(_encode_bits, _decode_bits),
}


def _shortest_coding(mask: np.ndarray) -> tuple[str, bytes]:
    best, shortest, limit = "", b"", mask.size + 1
    for name, coding in CODINGS.items():
        payload = coding.encode(mask, limit)
        if payload is not None and len(payload) < limit:
            best, shortest, limit = name, payload, len(payload)
    return best, shortest


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
        shape = tensors[name].shape
        if mask.dtype != torch.bool or mask.shape != shape:
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


def _encoded(masks: Mapping[str, Tensor], pool: Executor) -> Iterator[tuple[str, str, bytes]]:
    """Name, coding and payload of each mask, a few at a time."""
    names, width = list(masks), threads()
    for start in range(0, len(names), width):
        batch = names[start : start + width]
        found = pool.map(lambda name: _shortest_coding(_flat_mask(masks[name])), batch)
        yield from ((name, *coded) for name, coded in zip(batch, found, strict=True))


class _Span(NamedTuple):
    start: int
    stop: int


def _write(
    file: BinaryIO, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, int]:
    kept = {name: int(np.count_nonzero(_flat_mask(mask))) for name, mask in masks.items()}

    def header(spans: Mapping[str, _Span], codings: Mapping[str, str]) -> bytes:
        return _header_bytes(tensors, kept, metadata, spans, codings)

    # The payloads are only known once written, so the header goes into room left for the longest one there could be.
    size = sum(tensor.nbytes + tensor.numel() for tensor in tensors.values())
    blobs = [*tensors, *(name + MASK_SUFFIX for name in masks)]
    room = len(header(dict.fromkeys(blobs, _Span(size, 2 * size)), dict.fromkeys(masks, max(CODINGS, key=len))))
    room += -room % 8
    if room > _MAX_HEADER:
        raise ValueError(f"The names and metadata take {room} bytes; a packed file has room for {_MAX_HEADER}.")
    spans, codings = dict[str, _Span](), dict[str, str]()
    data_start = file.seek(8 + room)

    def write(name: str, pieces: Iterable[bytes | memoryview]) -> None:
        start = file.tell()
        for piece in pieces:
            file.write(piece)
        spans[name] = _Span(start - data_start, file.tell() - data_start)

    with ThreadPoolExecutor(threads()) as pool:
        # Large items first keeps every tensor aligned to its own item size, which readers that map the file rely on.
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
            if name in masks:
                write(name, _kept_values(name, tensors[name], masks[name], pool))
            else:
                write(name, [_flat_bits(tensors[name]).data])
        for name, codings[name], payload in _encoded(masks, pool):
            write(name + MASK_SUFFIX, [payload])
    file.seek(0)
    file.write(room.to_bytes(8, "little") + header(spans, codings).ljust(room))
    return {name: span.stop - span.start for name, span in spans.items()}


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


def _kept_values(name: str, tensor: Tensor, mask: Tensor, pool: Executor) -> Iterator[memoryview]:
    bits, keep = _flat_bits(tensor), _flat_mask(mask)

    def gather(start: int) -> memoryview:
        chunk, keep_chunk = bits[start : start + _CHUNK], keep[start : start + _CHUNK]
        kept = np.compress(keep_chunk, chunk)
        # Counting is much faster than to look at the pruned entries, which rarely hold as much as a -0.0.
        if np.count_nonzero(chunk) != np.count_nonzero(kept) and not _all_zero(chunk[~keep_chunk], tensor.dtype):
            raise ValueError(
                f"Tensor {name!r} is not zero in every entry that its mask prunes, and what is there would be lost; "
                "write zeros first with `tensor.masked_fill_(~mask, 0)`."
            )
        if _any_nan(kept, tensor.dtype):
            raise ValueError(
                f"Tensor {name!r} holds NaN in entries that its mask keeps, so it cannot be packed; the run diverged. "
                "To look at the model, save it with `packed=False`."
            )
        return kept.data

    return pool.map(gather, range(0, bits.size, _CHUNK))


def _all_zero(bits: np.ndarray, dtype: torch.dtype) -> bool:
    if not (dtype.is_floating_point or dtype.is_complex):
        return not bits.any()
    return not (_numbers(bits, dtype) != 0).any()


# In these NaN are the numbers whose bits, but for the sign, are above those of infinity.
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF0 << 48}


def _any_nan(bits: np.ndarray, dtype: torch.dtype) -> bool:
    if dtype in _INFINITY:
        # Not `isnan` of torch, whose threads and those that read tensors would wait for each other.
        return bool(((bits & bits.dtype.type(2 ** (8 * dtype.itemsize - 1) - 1)) > _INFINITY[dtype]).any())
    return (dtype.is_floating_point or dtype.is_complex) and bool(_numbers(bits, dtype).isnan().any())


def _numbers(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    values = torch.from_numpy(bits).view(dtype)
    # Types of one byte cannot be compared; as float32 they keep their values.
    return values.float() if dtype.itemsize == 1 else values


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
def blaming(subject: str) -> Iterator[None]:
    """Turn what the checks raise into the one exception of this module, its message begun with `subject`."""
    try:
        yield
    except ValueError as error:
        raise PackedFormatError(f"{subject} {error}") from error


def parse_json(text: bytes, what: str) -> Any:
    """A JSON document from outside.

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
    claims = parse_json(_read_header_bytes(file), "header")
    metadata = claims.pop("__metadata__", None) if isinstance(claims, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its header has no metadata.")
    if VERSION_KEY not in metadata:
        raise ValueError("it is an ordinary safetensors file, which nothing has packed.")
    if metadata[VERSION_KEY] != VERSION:
        raise ValueError(
            f"its packing version is {metadata[VERSION_KEY]!r} and this release reads {VERSION!r}; upgrade "
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
        raise ValueError(f"tensor {name!r} has no proper shape.")
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise ValueError(f"tensor {name!r} has too large a shape.")
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
    layout = parse_json(header.metadata.get(LAYOUT_KEY, "").encode(), LAYOUT_KEY)
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
    if values is None or payload is None or name.endswith(MASK_SUFFIX):
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


class PackedFile:
    """An open packed file, its header read and checked; a context manager.

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
                self._header = _read_header(self._file)
                self._layout = _read_layout(self._header)
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
        """The names in the file, as any reader of safetensors sees them: a mask is an array of its own."""
        return list(self._header.entries)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, unpacked."""
        packed = self._layout.packed.get(name)
        return torch.Size(packed.shape if packed else self._header.entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._header.entries[name].dtype

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor, dense, contiguous and on the CPU, and its mask, or None where it has no mask.

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
        if name not in self._layout.packed:
            return _as_tensor(self._read_items(entry, 0, math.prod(entry.shape)), entry.dtype, entry.shape), None
        packed = self._layout.packed[name]
        coded = self._header.entries[name + MASK_SUFFIX]
        payload = self._read_items(coded, 0, coded.shape[0]).tobytes()
        total, kept = math.prod(packed.shape), entry.shape[0]
        pieces = packed.coding.decode(payload, total, kept)
        items, mask, used = self._items.zeros(total, entry.dtype.itemsize), self._masks.zeros(total, 1), 0
        for positions in pieces:
            values = self._read_items(entry, used, positions.size)
            if _any_nan(values, entry.dtype):
                raise ValueError("has kept values that are NaN.")
            items[positions] = values
            mask[positions] = 1
            used += positions.size
        return _as_tensor(items, entry.dtype, packed.shape), _as_tensor(mask, torch.bool, packed.shape)

    def _read_items(self, entry: _Entry, first: int, count: int) -> np.ndarray:
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
