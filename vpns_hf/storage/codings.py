"""Code masks as bytes: dense, bits, Huffman-coded bits or gaps."""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# Masks and values are walked in pieces of this many entries, so that index arrays stay small and in the cache.
CHUNK = 2**18
# Bytes that zlib, given most memory, codes with one table, and what a table takes.
_BLOCK, _TABLE = 2**15, 80


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
    return (np.arange(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK))


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
    for start in range(0, packed.size, CHUNK // 8):
        bits = np.unpackbits(packed[start : start + CHUNK // 8]).view(np.bool_)
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
    for start in range(0, mask.size, CHUNK):
        chunk = mask[start : start + CHUNK]
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
    for start in range(0, steps.size, CHUNK):
        landing = lands[start : start + CHUNK]
        ends = np.add(steps[start : start + CHUNK], landing, dtype=np.int64)
        ends[0] += last
        np.cumsum(ends, out=ends)
        last = ends[-1]
        yield ends if landing.all() else ends[landing]


def _deflate(pieces: list[np.ndarray] | Iterator[np.ndarray]) -> bytes:
    # Masks do not repeat, so matches are not looked for; in larger blocks (memLevel 9) the tables of codes cost less.
    stream = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join([*map(stream.compress, pieces), stream.flush()])  # type: ignore[arg-type]


def _inflate(payload: bytes, limit: int) -> bytes:
    """Decompress a payload of [`_deflate`], and refuse more than `limit` bytes.

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


def shortest_coding(mask: np.ndarray) -> tuple[str, bytes]:
    """Return the name and the bytes of the coding that is shortest for a mask."""
    best, shortest, limit = "", b"", mask.size + 1
    for name, coding in CODINGS.items():
        payload = coding.encode(mask, limit)
        if payload is not None and len(payload) < limit:
            best, shortest, limit = name, payload, len(payload)
    return best, shortest
