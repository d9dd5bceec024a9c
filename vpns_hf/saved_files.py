"""Read files of a saved folder, which a stranger may have written, and check those that are to be published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .storage.header import parse_json, read_header_bytes

MAX_JSON, MAX_YAML, MAX_CARD = 2**24, 2**16, 2**20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PNG = b"\x89PNG\r\n\x1a\n"


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few bytes of which stand for gigabytes, and without keys that are there twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias, which no file of ours has.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        content = super().construct_mapping(node, deep)
        if len(content) < len(node.value):
            keys = [getattr(key, "value", None) for key, _ in node.value]
            raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice.")
        return content


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        ValueError: it is something else or larger.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file.")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} takes more than {limit} bytes.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is no sound JSON, no object or too large.
    """
    try:
        content = parse_json(read_bytes(path, MAX_JSON), "content")
    except ValueError as error:
        raise ValueError(f"{path} is no sound JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object.")
    return content


def read_yaml(path: Path, text: str) -> Any:
    """Parse YAML of at most `MAX_YAML` characters, without aliases.

    Args:
        path: where it is from, for the messages.
        text: the document.

    Raises:
        ValueError: it is no sound YAML or too large.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"{path} holds more than {MAX_YAML} characters of YAML.")
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no sound YAML: {' '.join(str(error).split())}") from None


def read_text(path: Path, limit: int) -> str:
    """Read UTF-8 text.

    Raises:
        ValueError: it is no text or too large.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text.") from None


def read_front_matter(path: Path) -> dict[str, Any]:
    """Read the YAML block that a card starts with, between two lines of three dashes.

    Returns:
        Its values by name; empty without such a block.

    Raises:
        ValueError: it is no sound YAML, holds something else than names with values, or the file is no text or too
            large.
    """
    parts = re.split(r"^---\s*$", read_text(path, MAX_CARD), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    values = read_yaml(path, parts[1])
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} has metadata that are no names with values.")
    return values


def check_weights(path: Path) -> None:
    """Refuse what stands where weights should be: no regular file, or a pointer of git LFS.

    Raises:
        ValueError: the reason in one sentence.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file.")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a pointer of git LFS, not the weights; fetch them with `git lfs pull`.")


def check_published(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that lie outside the folder behind a link, or that hold something else than their names say.

    Args:
        folder: what is published; links to the blobs beside a snapshot of the Hub's cache are no links out of it.
        names: paths in it.

    Raises:
        ValueError: the reason in one sentence.
    """
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in names:
        path = folder / name
        if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            raise ValueError(f"{path} is a link to a file outside the folder; copy the file if it is to be published.")
        _check_content(path)


def _check_content(path: Path) -> None:
    match path.suffix:
        case ".png":
            with path.open("rb") as file:
                if file.read(len(_PNG)) != _PNG:
                    raise ValueError(f"{path} is no PNG picture.")
        case ".json":
            read_json(path)
        case ".yaml":
            read_yaml(path, read_text(path, MAX_YAML))
        case ".md":
            read_text(path, MAX_CARD)
        case ".safetensors":
            check_weights(path)
            try:
                with path.open("rb") as file:
                    header = json.loads(read_header_bytes(file))
            except (ValueError, RecursionError):
                header = None
            if not isinstance(header, dict):
                raise ValueError(f"{path} is no safetensors file.")


def printable(text: str, limit: int = 300) -> str:
    """Text in one line of at most `limit` characters, without those by which a file could steer the terminal."""
    line = "".join(character if character.isprintable() else "?" for character in text[: limit + 1])
    return line if len(text) <= limit else f"{line[:limit]}..."
