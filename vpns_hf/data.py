"""Data: any image classification data set as splits train, validation and test with columns image and label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from sklearn.model_selection import train_test_split

from .transfer_tasks import TRANSFER_TASKS

logger = logging.getLogger(__name__)


def load_transfer_dataset(
    path: str | Path | Dataset | DatasetDict,
    *,
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 42,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> DatasetDict:
    """Load a classification data set as splits `train`, `validation` and `test` with columns `image` and `label`.

    Images come out as RGB whatever they were stored as. Classes are the same `ClassLabel` in every split: integer and
    string labels are numbered in sorted order over all splits together. A validation or test split that the data set
    does not have is carved from `train`, stratified by class: the same seed always gives the same images.

    Args:
        path: key of `TRANSFER_TASKS`, Hub id, local folder (image folder, parquet or arrow files, or what
            `save_to_disk` wrote), or a data set in memory. A folder named like a key is meant as `./<folder>`.
        name: configuration of the data set, where it has several.
        image_column: column of the images; `None` finds it.
        label_column: column of the classes; `None` finds it.
        train_split: split to train on; `None` means `train`.
        validation_split: split to select on; `None` means `validation`, else it is carved from the training split.
        test_split: split to report on; `None` means `test`, else it is carved from the training split with a warning.
        validation_fraction: share of the training split that a carved split takes.
        seed: seed of the carved splits.
        revision: commit, tag or branch of a data set on the Hub.
        cache_dir: folder that `datasets` keeps its files in.
        token: Hub token for private and gated data sets.

    Returns:
        The three splits.

    Raises:
        ConnectionError: if the Hub cannot be reached and the data set is not in the local cache.
        FileNotFoundError: if there is no such data set or folder.
        ValueError: if a split or column is missing, labels are missing, or a class is too small to be split.
    """
    task = TRANSFER_TASKS.get(path) if isinstance(path, str) else None
    if task is not None:
        path, name = task.path, name or task.name
        image_column, label_column = image_column or task.image, label_column or task.label
        train_split, test_split = train_split or task.train, test_split or task.test
        validation_split = validation_split or task.validation
    raw = _read(path, name=name, revision=revision, cache_dir=cache_dir, token=token)
    splits = _choose_splits(raw, train_split, validation_split, test_split)
    splits = _choose_columns(splits, image_column, label_column)
    splits = _encode_labels(splits)
    if "test" not in splits:
        logger.warning(
            "The data set has no test split: %.3g of the training split is held out as one.", validation_fraction
        )
        splits = _carve(splits, "test", validation_fraction, seed)
    if "validation" not in splits:
        logger.info("%.3g of the training split is held out for validation.", validation_fraction)
        splits = _carve(splits, "validation", validation_fraction, seed)
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test")})


def _read(path: str | Path | Dataset | DatasetDict, **options: Any) -> DatasetDict:
    """The data set as it is stored, all splits."""
    if isinstance(path, str | Path):
        folder = Path(path)
        saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        path = load_from_disk(str(folder)) if saved else _load(str(path), **options)
    return DatasetDict({"train": path}) if isinstance(path, Dataset) else path


def _load(path: str, **options: Any) -> DatasetDict:
    """`load_dataset`, with its many ways to fail put into one sentence."""
    try:
        return load_dataset(path, **options)
    except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"The data set '{path}' is neither a local folder nor in the local cache, and the Hugging Face Hub cannot "
            "be reached: load it once on a machine with a network and copy the cache here (HF_HUB_OFFLINE=1 keeps to "
            "the cache), or pass the path of a local folder."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No data set was found at '{path}': expected a key of TRANSFER_TASKS, a data set of the Hugging Face Hub "
            "that you may read (pass token= for a private or gated one), or a local folder of images in one folder a "
            "class, of parquet or arrow files, or written by save_to_disk."
        ) from error


def _choose_splits(raw: DatasetDict, train: str | None, validation: str | None, test: str | None) -> DatasetDict:
    """The splits that are asked for, under our names; validation and test may be absent where none was asked for."""
    train = train or "train"
    test = test or ("test" if "test" in raw else None)
    if validation is None and "validation" in raw and test != "validation":
        validation = "validation"
    chosen = {"train": train, "validation": validation, "test": test}
    chosen = {ours: theirs for ours, theirs in chosen.items() if theirs is not None}
    for ours, theirs in chosen.items():
        if theirs not in raw:
            raise ValueError(
                f"The data set has no split '{theirs}' to use for {ours}: its splits are {_listed(raw)}, "
                f"name one of them with {ours}_split."
            )
    if len(set(chosen.values())) < len(chosen):
        raise ValueError(
            f"One split is used twice ({', '.join(f'{ours}: {theirs}' for ours, theirs in chosen.items())}): "
            "give train_split, validation_split and test_split different names."
        )
    return DatasetDict({ours: raw[theirs] for ours, theirs in chosen.items()})


def _choose_columns(splits: DatasetDict, image: str | None, label: str | None) -> DatasetDict:
    """The splits with columns `image` (RGB) and `label` only."""
    features = splits["train"].features
    image = image or _find_column(features, Image, ("image", "img"), "image")
    label = label or _find_column(features, ClassLabel, ("label", "labels", "fine_label", "target", "class"), "label")
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}

    def choose(name: str, split: Dataset) -> Dataset:
        for ours, theirs in (("image", image), ("label", label)):
            if theirs not in split.column_names:
                raise ValueError(
                    f"The split '{name}' has no column '{theirs}': its columns are {_listed(split.column_names)}, "
                    f"name one of them with {ours}_column."
                )
        split = split.with_format(None).select_columns([image, label]).rename_columns(renamed)
        return split.cast_column("image", Image(mode="RGB"))

    return DatasetDict({name: choose(name, split) for name, split in splits.items()})


def _find_column(features: Features, kind: type, usual_names: Sequence[str], what: str) -> str:
    """The only column of type `kind`, else the first of the usual names."""
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return typed[0]
    for column in usual_names:
        if column in (typed or features):
            return column
    raise ValueError(
        f"It is not clear which column holds the {what}s among {_listed(features)}: name it with {what}_column."
    )


def _encode_labels(splits: DatasetDict) -> DatasetDict:
    """The splits with one and the same `ClassLabel` for their labels."""
    labels = {name: split["label"][:] for name, split in splits.items()}
    for name, values in labels.items():
        unlabelled = sum(value is None or value == -1 for value in values)
        if unlabelled or not values:
            raise ValueError(
                f"The split '{name}' has no labels for {unlabelled} of its {len(values)} images: "
                f"choose a labelled one with {name}_split or remove the images without a label."
            )
    features = {name: split.features["label"] for name, split in splits.items()}
    if isinstance(features["train"], ClassLabel) and all(each == features["train"] for each in features.values()):
        return splits
    for name, feature in features.items():
        if isinstance(feature, ClassLabel):
            labels[name] = feature.int2str(labels[name])
    # Not `class_encode_column`: it numbers each split for itself, sorts 10 before 2, and rewrites the images.
    classes = _sorted_classes(list(chain.from_iterable(labels.values())), features["train"])
    ids = {value: index for index, value in enumerate(classes)}
    feature = ClassLabel(names=[str(value) for value in classes])
    return DatasetDict(
        {
            name: split.remove_columns("label").add_column("label", [ids[v] for v in labels[name]], feature=feature)
            for name, split in splits.items()
        }
    )


def _sorted_classes(values: Sequence[Any], feature: Any) -> list[Any]:
    """The distinct labels in order."""
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise ValueError(
            f"The label column holds {feature}: expected one whole number or one string for each image, the same type "
            "in every split, name another column with label_column or convert it."
        )
    return sorted(set(values))


def _carve(splits: DatasetDict, name: str, fraction: float, seed: int) -> DatasetDict:
    """The splits with a stratified share of `train` moved to a new split; both keep the order of `train`."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}: expected a share between 0 and 1, such as 0.1.")
    train = splits["train"]
    labels = np.asarray(train["label"][:])
    counts = np.bincount(labels)
    if (counts == 1).any():
        label = train.features["label"].int2str(int(np.argmax(counts == 1)))
        raise ValueError(
            f"The class '{label}' has only one training image, so no {name} split can be carved from the training "
            f"split: name a split with {name}_split, add images or leave the class out."
        )
    size, num_classes = ceil(fraction * len(labels)), np.count_nonzero(counts)
    if min(size, len(labels) - size) < num_classes:
        smallest = train.features["label"].int2str(int(np.argmin(np.where(counts > 0, counts, counts.max()))))
        raise ValueError(
            f"Carving {size} of {len(labels)} training images as the {name} split leaves less than one image a class "
            f"for {num_classes} classes (the smallest is '{smallest}' with {counts[counts > 0].min()}): change "
            f"validation_fraction (now {fraction}) or name a split with {name}_split."
        )
    kept, carved = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
    return DatasetDict({**splits, "train": train.select(np.sort(kept)), name: train.select(np.sort(carved))})


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)
