"""Packed safetensors: the values of kept weights beside their entropy-coded masks."""

from .codings import CODINGS
from .header import LAYOUT_KEY, MASK_SUFFIX, VERSION, VERSION_KEY, PackedFormatError, blaming, parse_json
from .reading import PackedFile, is_packed, load_packed
from .writing import largest_packed_size, save_packed

__all__ = [
    "CODINGS",
    "LAYOUT_KEY",
    "MASK_SUFFIX",
    "VERSION",
    "VERSION_KEY",
    "PackedFile",
    "PackedFormatError",
    "blaming",
    "is_packed",
    "largest_packed_size",
    "load_packed",
    "parse_json",
    "save_packed",
]
