"""Mutations of bytes and of JSON documents, each drawn from a generator that the caller seeds."""

import json
import math
import random
from typing import Any

VALUES = [0, 1, -1, 2, 3, 2**31, 2**63, 10**6, 10**9, 10**30, True, False, None, 0.5, 1e-30, 1e9, math.nan, math.inf]
WORDS = ["", "no", "0", "auto", "a:b", "../x", "\x1b[2J", "é" * 300, "frozen", "dense", "search", "layer", "F64"]


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    """One bit turned over."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def set_byte(content: bytes, rng: random.Random) -> bytes:
    """One byte replaced by one that readers of JSON and numbers stumble over."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([rng.choice([0, 1, 0x7F, 0xFF, *b'0129"{}[],:-e'])]) + content[at + 1 :]


def cut(content: bytes, rng: random.Random) -> bytes:
    """A stretch left out."""
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice([1, 2, 8, len(content)]) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    """Random bytes put in."""
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice([1, 2, 8, 100])) + content[at:]


def copy_part(content: bytes, rng: random.Random) -> bytes:
    """A stretch copied to another place, over what is there or before it."""
    start, at = rng.randrange(len(content)), rng.randrange(len(content))
    part = content[start : start + rng.randrange(1, 40)]
    return content[:at] + part + content[at + len(part) * rng.randrange(2) :]


BYTE_MUTATIONS = [flip_bit, set_byte, cut, insert, copy_part]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """One of the mutations above."""
    return rng.choice(BYTE_MUTATIONS)(content or b"\0", rng)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """A value somewhere in the document replaced, removed, renamed or moved."""
    document = json.loads(content)
    replace_a_value(document, rng, [*VALUES, *WORDS, [], {}, [1, 2], {"a": {}}])
    return json.dumps(document).encode()


def replace_a_value(node: Any, rng: random.Random, others: list[Any]) -> None:
    """Replace one value of a nested document, which is changed in place, by a relative of it or one of the others."""
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.1:
            break
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.15:
        value = node.pop(key)
        if rng.random() < 0.5:
            node[rng.choice([key + "_", key.upper(), *keys])] = value
        return
    value = node[key]
    relatives: list[Any] = []
    if type(value) is int:
        relatives = [value + rng.randrange(-9, 10), value * 8, -value]
    elif isinstance(value, list):
        relatives = [value + value, value[:-1], [value], [str(item) for item in value]]
    elif isinstance(value, str):
        relatives = [value.upper(), value + " ", value[:-1]]
    node[key] = rng.choice(relatives + others)
