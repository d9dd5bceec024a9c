"""Write packed safetensors files."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .codings import CHUNK, CODINGS, shortest_coding
from .header import DTYPE_CODES, LAYOUT_KEY, MASK_SUFFIX, MAX_HEADER, VERSION, VERSION_KEY, Checksum

# Each takes up to a byte for every entry of the mask that it packs or unpacks.
_MAX_THREADS = 8


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


def largest_packed_size(tensor: Tensor, mask: Tensor | None) -> int:
    """Bytes that a tensor takes at most in a packed file, its header aside."""
    if mask is None:
        return tensor.nbytes
    return int(mask.count_nonzero()) * tensor.itemsize + (mask.numel() + 7) // 8


def threads() -> int:
    """Return the number of tensors packed or unpacked at a time: as many as torch uses threads, up to 8."""
    # Nearly all of the time goes into zlib and numpy, which let other threads run.
    return min(torch.get_num_threads(), _MAX_THREADS)


def _check_savable(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    for name, tensor in (*tensors.items(), *masks.items()):
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name!r} cannot be stored: expected tensors by name, and it is a {type(tensor).__name__}."
            )
    for name, tensor in tensors.items():
        if name == "__metadata__" or name.endswith(MASK_SUFFIX):
            raise ValueError(f"No tensor can be stored as {name!r}: the file format takes that name itself.")
        if tensor.dtype not in DTYPE_CODES or tensor.layout != torch.strided or tensor.is_meta:
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
    """View the entries in row-major order as unsigned integers of their size; shares memory where it can."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().view(f"u{tensor.itemsize}")


def _flat_mask(mask: Tensor) -> np.ndarray:
    return mask.detach().cpu().contiguous().view(-1).numpy()


def _encoded(masks: Mapping[str, Tensor], pool: Executor) -> Iterator[tuple[str, str, bytes]]:
    """Name, coding and payload of each mask, a few at a time."""
    names, width = list(masks), threads()
    for start in range(0, len(names), width):
        batch = names[start : start + width]
        found = pool.map(lambda name: shortest_coding(_flat_mask(masks[name])), batch)
        yield from ((name, *coded) for name, coded in zip(batch, found, strict=True))


class _Span(NamedTuple):
    start: int
    stop: int
    checksum: str


def _write(
    file: BinaryIO, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, int]:
    kept = {name: int(np.count_nonzero(_flat_mask(mask))) for name, mask in masks.items()}

    def header(spans: Mapping[str, _Span], codings: Mapping[str, str]) -> bytes:
        return _header_bytes(tensors, kept, metadata, spans, codings)

    # The payloads are only known once written, so the header goes into room left for the longest one there could be.
    size = sum(tensor.nbytes + tensor.numel() for tensor in tensors.values())
    blobs = [*tensors, *(name + MASK_SUFFIX for name in masks)]
    room = len(
        header(dict.fromkeys(blobs, _Span(size, 2 * size, "0" * 8)), dict.fromkeys(masks, max(CODINGS, key=len)))
    )
    room += -room % 8
    if room > MAX_HEADER:
        raise ValueError(f"The names and metadata take {room} bytes; a packed file has room for {MAX_HEADER}.")
    spans, codings = dict[str, _Span](), dict[str, str]()
    data_start = file.seek(8 + room)

    def write(name: str, checksum: Checksum, pieces: Iterable[bytes | memoryview]) -> None:
        start = file.tell()
        for piece in pieces:
            file.write(piece)
            checksum.update(piece)
        spans[name] = _Span(start - data_start, file.tell() - data_start, checksum.hexdigest())

    with ThreadPoolExecutor(threads()) as pool:
        # Large items first keeps every tensor aligned to its own item size, which readers that map the file rely on.
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
            tensor = tensors[name]
            shape = [kept[name]] if name in masks else list(tensor.shape)
            checksum = Checksum(name, DTYPE_CODES[tensor.dtype], shape)
            if name in masks:
                write(name, checksum, _kept_values(name, tensor, masks[name], pool))
            else:
                write(name, checksum, [_flat_bits(tensor).data])
        for name, codings[name], payload in _encoded(masks, pool):
            checksum = Checksum(name + MASK_SUFFIX, codings[name], list(masks[name].shape))
            write(name + MASK_SUFFIX, checksum, [payload])
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
    checksums = {name: span.checksum for name, span in spans.items()}
    contents = {"metadata": list(metadata), "packed": packed, "checksums": checksums}
    layout = json.dumps(contents, ensure_ascii=False, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, VERSION_KEY: VERSION, LAYOUT_KEY: layout}}
    for name, tensor in tensors.items():
        shape = [kept[name]] if name in kept else list(tensor.shape)
        header[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": shape, "data_offsets": spans[name][:2]}
    for name in kept:
        span = spans[name + MASK_SUFFIX]
        header[name + MASK_SUFFIX] = {"dtype": "U8", "shape": [span.stop - span.start], "data_offsets": span[:2]}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _kept_values(name: str, tensor: Tensor, mask: Tensor, pool: Executor) -> Iterator[memoryview]:
    bits, keep = _flat_bits(tensor), _flat_mask(mask)

    def gather(start: int) -> memoryview:
        chunk, keep_chunk = bits[start : start + CHUNK], keep[start : start + CHUNK]
        kept = np.compress(keep_chunk, chunk)
        # Counting is much faster than to look at the pruned entries, which rarely hold as much as a -0.0.
        if np.count_nonzero(chunk) != np.count_nonzero(kept) and not _all_zero(chunk[~keep_chunk], tensor.dtype):
            raise ValueError(
                f"Tensor {name!r} is not zero in every entry that its mask prunes, and what is there would be lost; "
                "write zeros first with `tensor.masked_fill_(~mask, 0)`."
            )
        if any_nan(kept, tensor.dtype):
            raise ValueError(
                f"Tensor {name!r} holds NaN in entries that its mask keeps, so it cannot be packed; the run diverged. "
                "To look at the model, save it with `packed=False`."
            )
        return kept.data

    return pool.map(gather, range(0, bits.size, CHUNK))


def _all_zero(bits: np.ndarray, dtype: torch.dtype) -> bool:
    if not (dtype.is_floating_point or dtype.is_complex):
        return not bits.any()
    return not (_numbers(bits, dtype) != 0).any()


# In these NaN are the numbers whose bits, but for the sign, are above those of infinity.
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF0 << 48}


def any_nan(bits: np.ndarray, dtype: torch.dtype) -> bool:
    """Return whether the bit patterns of a floating-point dtype hold NaN."""
    if dtype in _INFINITY:
        # Not `isnan` of torch, whose threads and those that read tensors would wait for each other.
        return bool(((bits & bits.dtype.type(2 ** (8 * dtype.itemsize - 1) - 1)) > _INFINITY[dtype]).any())
    return (dtype.is_floating_point or dtype.is_complex) and bool(_numbers(bits, dtype).isnan().any())


def _numbers(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    values = torch.from_numpy(bits).view(dtype)
    # Types of one byte cannot be compared; as float32 they keep their values.
    return values.float() if dtype.itemsize == 1 else values
