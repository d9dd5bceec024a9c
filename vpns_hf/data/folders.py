"""Read local image folders: one folder per class, in one folder per split or in none.

`datasets` finds splits by words such as "train" in *any* part of a path and leaves the other images out without a
message. Here only folders that hold class folders are splits, and every image that is not used is reported.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import metadata_load

from .columns import check_names
from .splits import listed

logger = logging.getLogger(__name__)
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words that mark a folder as a split, in any letter case, alone or between separators and digits."""
_TABLES = (".parquet", ".arrow", ".tar", ".lance")
_METADATA = tuple(ImageFolder.METADATA_FILENAMES)
_LAYOUT = "expected one folder per class, or folders train, validation and test with one folder per class in each"

Tree = Mapping[PurePosixPath, Sequence[str]]
"""The image files in each folder that holds any: folder relative to the root -> sorted file names."""


@dataclass(frozen=True)
class FolderListing:
    """List the files below a folder.

    Args:
        images: image files of each folder that holds any.
        hidden: image files below a folder whose name starts with a dot or two underscores, or with such a name.
        others: files without the suffix of an image.
        has_metadata: presence of a `metadata.csv` (or `.jsonl`, `.parquet`) about the images.
    """

    images: Tree
    hidden: tuple[str, ...]
    others: tuple[str, ...]
    has_metadata: bool

    @property
    def num_images(self) -> int:
        """Count the image files, hidden ones excepted."""
        return sum(map(len, self.images.values()))

    @property
    def is_mostly_images(self) -> bool:
        """Compare the number of images with that of files that hold whole tables of them."""
        return self.num_images > sum(file.lower().endswith(_TABLES) for file in self.others)


@dataclass(frozen=True)
class ClassFolders:
    """Name the class folders of each split.

    Args:
        splits: split -> class -> its folder, relative to the root.
        left_out: reason -> images outside class folders, relative to the root.
    """

    splits: Mapping[str, Mapping[str, PurePosixPath]]
    left_out: Mapping[str, Sequence[str]]


def list_folder(root: Path) -> FolderListing:
    """List the files below a folder; follows links to folders, except those that lead back up."""
    images: dict[PurePosixPath, list[str]] = {}
    hidden: list[str] = []
    others: list[str] = []
    has_metadata = False
    for place, folders, names in os.walk(root, followlinks=True):
        if os.path.islink(place) and Path(place).resolve() in Path(place).parent.resolve().joinpath("_").parents:
            folders.clear()
            continue
        folders.sort()
        folder = PurePosixPath(Path(place).relative_to(root).as_posix())
        is_hidden = any(part.startswith((".", "__")) for part in folder.parts)
        for name in sorted(names):
            if Path(name).suffix.lower() not in ImageFolder.EXTENSIONS:
                others.append(str(folder / name))
                has_metadata = has_metadata or (name in _METADATA and not is_hidden)
            elif is_hidden or name.startswith("."):
                hidden.append(str(folder / name))
            else:
                images.setdefault(folder, []).append(name)
    return FolderListing(images, tuple(hidden), tuple(others), has_metadata)


def is_image_folder(root: Path, listing: FolderListing) -> bool:
    """Decide whether folders alone give the classes; else `datasets` reads the folder by its metadata or tables."""
    if not listing.is_mostly_images or listing.has_metadata:
        return False
    card = root / "README.md"
    return not (card.is_file() and "configs" in (metadata_load(card) or {}))


def read_image_folder(
    root: Path, listing: FolderListing, asked: Collection[str], cache_dir: str | Path | None, streaming: bool
) -> DatasetDict:
    """Read an image folder as one data set per split, with columns `image` and `label`.

    Args:
        root: the folder.
        listing: its files.
        asked: names of splits that the user gave; folders with these names keep them.
        cache_dir: cache folder of `datasets`.
        streaming: streams instead of data sets.

    Returns:
        The splits; in each, rows are sorted by path and classes by name.

    Raises:
        ValueError: the class or split of an image is ambiguous.
    """
    found = find_class_folders(listing.images, asked, root)
    check_names(sorted(set(chain.from_iterable(found.splits.values()))), ignore_case=True)
    left_out = {
        **found.left_out,
        "hidden": listing.hidden,
        "no image by its suffix": [file for file in listing.others if "/" in file],
    }
    for reason, files in left_out.items():
        if files:
            logger.warning("Left out: %d files of '%s' (%s): %s.", len(files), root, reason, _some(files))
    return DatasetDict(
        {
            split: _dataset(root, listing.images, classes, cache_dir, streaming)
            for split, classes in found.splits.items()
        }
    )


def find_class_folders(images: Tree, asked: Collection[str], root: Path) -> ClassFolders:
    """Tell splits from classes by where the images lie.

    A folder that holds images directly is a class, whatever its name. A folder that holds class folders is a split if
    its name says so. Folders of other names above the classes only group them, unless they share class names.

    Args:
        images: image files of each folder that holds any.
        asked: names of splits that the user gave.
        root: the folder, for messages.

    Raises:
        ValueError: images lie at different depths, class folders are missing, or a class has several folders.
    """
    top = _unwrap(images, PurePosixPath("."), is_split=False)
    groups = _children(images, top)
    nested = {name: folder for name, folder in groups.items() if _children(images, folder)}
    flat = {name: folder for name, folder in groups.items() if name not in nested}
    left_out = {"in no class folder": _files(images, _chain(PurePosixPath("."), top))}
    if not groups:
        raise ValueError(f"The folder '{root}' holds images but no folders of classes: {_LAYOUT}.")
    if not nested:
        _refuse_splits_without_classes(flat, root)
    if not any(_is_split(name, asked) for name in nested) and not _share_classes(images, nested.values()):
        return ClassFolders({"train": _classes(images, top, root)}, left_out)
    names = _split_names(nested, asked)
    splits = {}
    for name, folder in nested.items():
        inner = _unwrap(images, folder, is_split=True)
        left_out["in no class folder"] += _files(images, _chain(folder, inner))
        splits[names[name]] = _classes(images, inner, root)
    for name, folder in flat.items():
        left_out[f"the folder '{name}' has no class folders"] = _files(images, [folder])
    return ClassFolders(splits, left_out)


def _children(images: Tree, folder: PurePosixPath) -> dict[str, PurePosixPath]:
    """Find the folders directly in `folder` with images in or below them, by name."""
    depth = len(folder.parts)
    names = {each.parts[depth] for each in images if folder in each.parents}
    return {name: folder / name for name in sorted(names)}


def _unwrap(images: Tree, folder: PurePosixPath, is_split: bool) -> PurePosixPath:
    """Descend through folders that hold one folder only, down to the one above the classes or splits."""
    children = _children(images, folder)
    if len(children) != 1:
        return folder
    name, child = children.popitem()
    if not _children(images, child) or (_split_word(name) is not None and not is_split):
        return folder
    return _unwrap(images, child, is_split)


def _chain(first: PurePosixPath, last: PurePosixPath) -> list[PurePosixPath]:
    """List the folders from `first` down to `last`."""
    return [folder for folder in (*reversed(last.parents), last) if folder == first or first in folder.parents]


def _classes(images: Tree, top: PurePosixPath, root: Path) -> dict[str, PurePosixPath]:
    """Find the class folders below `top`, by name."""
    leaves = sorted(folder for folder in images if top in folder.parents)
    depths = {len(folder.parts): folder for folder in reversed(leaves)}
    if len(depths) > 1:
        examples = listed(f"'{folder / images[folder][0]}'" for _, folder in sorted(depths.items()))
        raise ValueError(
            f"The images of '{root}' lie at different depths ({examples}), so their classes are not known: {_LAYOUT}."
        )
    classes: dict[str, PurePosixPath] = {}
    for folder in leaves:
        if folder.name in classes:
            raise ValueError(
                f"The folders '{classes[folder.name]}' and '{folder}' of '{root}' have the same class name: move the "
                "images of one class into one folder, or rename one of the two."
            )
        classes[folder.name] = folder
    return classes


def _split_word(name: str) -> str | None:
    """Find the split that the name of a folder stands for, if it is exactly one."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    found = [split for split, keywords in SPLIT_WORDS.items() if set(keywords) & set(words)]
    return found[0] if len(found) == 1 else None


def _is_split(name: str, asked: Collection[str]) -> bool:
    return name in asked or _split_word(name) is not None


def _split_names(folders: Collection[str], asked: Collection[str]) -> dict[str, str]:
    """Name the split of each folder: by its word, if no other folder has that word; else by its own name."""
    names = {folder: folder if folder in asked else _split_word(folder) or folder for folder in folders}
    counts = Counter(names.values())
    return {folder: name if counts[name] == 1 else folder for folder, name in names.items()}


def _share_classes(images: Tree, folders: Collection[PurePosixPath]) -> bool:
    names = [{each.name for each in images if folder in each.parents} for folder in folders]
    return sum(map(len, names)) > len(set().union(*names))


def _refuse_splits_without_classes(folders: Collection[str], root: Path) -> None:
    splits = [name for name in folders if _split_word(name) is not None]
    if len(splits) > 1 or len(splits) == len(folders):
        raise ValueError(
            f"The folders {listed(splits)} of '{root}' are named like splits and hold images without folders of "
            f"classes: {_LAYOUT}; if they are classes, move all class folders into a folder 'train'."
        )


def _files(images: Tree, folders: Sequence[PurePosixPath]) -> list[str]:
    return [str(folder / name) for folder in folders for name in images.get(folder, ())]


def _some(files: Sequence[str]) -> str:
    return listed(files[:3]) + (", ..." if len(files) > 3 else "")


def _dataset(
    root: Path,
    images: Tree,
    classes: Mapping[str, PurePosixPath],
    cache_dir: str | Path | None,
    streaming: bool,
) -> Dataset | IterableDataset:
    """Build the data set of some class folders; file sizes and times invalidate the cache when files change."""
    names = sorted(classes)
    files = []
    for label, name in enumerate(names):
        for file in _files(images, [classes[name]]):
            path = root.resolve() / file
            stat = path.stat()
            files.append((str(path), label, stat.st_size, stat.st_mtime_ns))
    files.sort()
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs={"files": files})
    return Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"files": files},
        cache_dir=None if cache_dir is None else str(cache_dir),
    )


def _rows(files: Sequence[tuple[str, int, int, int]]) -> Iterator[dict[str, Any]]:
    for path, label, _, _ in files:
        yield {"image": path, "label": label}
