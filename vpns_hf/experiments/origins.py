"""Read what data sets and backbones say of themselves: name, licence and source, for the model card of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..hub import CARD_NAME
from ..saved_files import read_front_matter
from ..values import TEXT, list_of


@dataclass(frozen=True)
class Origin:
    """Data set or backbone, as people know it.

    Args:
        title: its name.
        license: identifier of its licence, as the Hub spells it; None where none is stated.
        source: where it comes from, an address or a sentence; None where that is not stated.
    """

    title: str
    license: str | None = None
    source: str | None = None


def dataset_origin(name: str, title: str | None = None) -> Origin:
    """Read `pretty_name`, `license` and `source` from the YAML block of the `README.md` in a local data set.

    Args:
        name: task, Hub id or local folder; only a folder is read.
        title: title that is used before all others, such as that of a recipe.

    Returns:
        Without any title, a Hub id as it is and a folder by its name and that of its parent.

    Raises:
        ValueError: a value is no text, or the YAML is not sound.
    """
    path = Path(name) / CARD_NAME
    stated = read_front_matter(path) if path.is_file() else {}
    pretty_name, license_, source = (_text(path, stated, key) for key in ("pretty_name", "license", "source"))
    return Origin(title or pretty_name or public_name(name), license_, source)


def backbone_origin(name: str) -> Origin:
    """Read name and licence from the model card of a backbone; a card that cannot be read states nothing.

    Args:
        name: Hub id, which is its own title, or local folder.
    """
    is_folder = Path(name).is_dir()
    source = Path(name) / CARD_NAME if is_folder else name
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return Origin(public_name(name))
    return Origin((is_folder and data.model_name) or public_name(name), data.license)


def public_name(path: str) -> str:
    """Name a model or data set: a Hub id as it is, a local folder by its name and that of its parent."""
    return "/".join(Path(path).resolve().parts[-2:]) if Path(path).is_dir() else path


def _text(path: Path, stated: dict[str, Any], key: str) -> str | None:
    """Return a value of the YAML block: text, or a list of texts that are joined."""
    value = stated.get(key)
    if value is None or TEXT.accepts(value):
        return value or None
    if list_of(TEXT, "texts").accepts(value):
        return ", ".join(value) or None
    raise ValueError(f"`{key}` in {path} is {value!r}; expected text, such as `{key}: mit`.")
