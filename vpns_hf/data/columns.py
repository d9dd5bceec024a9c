"""Choose the image and label columns of a data set and encode its labels."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image

from .images import RGB_IMAGE
from .splits import Part, listed

logger = logging.getLogger(__name__)


def require_columns(part: Part, hints: Mapping[str, str]) -> None:
    """Raise `ValueError` for the first missing column, with its hint."""
    for column, hint in hints.items():
        if column not in part.data.column_names:
            raise ValueError(
                f"The split '{part.stored.split}' has no column '{column}': its columns are "
                f"{listed(part.data.column_names)}, {hint}."
            )


def choose_columns(parts: dict[str, Part], image: str | None, label: str | None) -> dict[str, Part]:
    """Reduce the parts to the columns `image` (RGB) and `label`."""
    features = parts["train"].data.features
    image = image or _find_column(features, Image, ("image", "img"), "image")
    label = label or _find_column(features, ClassLabel, ("label", "labels", "fine_label", "target", "class"), "label")
    wanted = ((image, "image"), (label, "label"))
    renamed = {theirs: ours for theirs, ours in wanted if theirs != ours}

    def choose(part: Part) -> Part:
        require_columns(
            part, {column: f"name one of them with {what}_column (`--{what}_column_name`)" for column, what in wanted}
        )
        data = part.data.select_columns([image, label]).rename_columns(renamed)
        return replace(part, data=data.cast_column("image", RGB_IMAGE))

    return {ours: choose(part) for ours, part in parts.items()}


def _find_column(features: Features, kind: type, usual_names: Sequence[str], what: str) -> str:
    """Find the only column of type `kind`, else the first of the usual names."""
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return typed[0]
    for column in usual_names:
        if column in (typed or features):
            return column
    raise ValueError(
        f"It is not clear which column holds the {what}s among {listed(features)}: name it with "
        f"{what}_column (`--{what}_column_name`)."
    )


def encode_labels(parts: dict[str, Part]) -> dict[str, Part]:
    """Encode the labels of all parts with one and the same `ClassLabel`.

    Raises:
        ValueError: images have no label, a label is none of the declared classes, or class names are hardly
            distinct.
    """
    labels = {ours: part.data["label"][:] for ours, part in parts.items()}
    for ours, part in parts.items():
        _check_labels(labels[ours], part.data.features["label"], part.stored.split, ours)
    features = [part.data.features["label"] for part in parts.values()]
    if all(isinstance(each, ClassLabel) and each == features[0] for each in features):
        check_names(features[0].names, ignore_case=False)
        return parts
    # Not `class_encode_column`: it numbers each split for itself, sorts 10 before 2, and rewrites the images.
    for (ours, values), each in zip(labels.items(), features, strict=True):
        labels[ours] = each.int2str(values) if isinstance(each, ClassLabel) else values
    classes = _sorted_classes(list(chain.from_iterable(labels.values())), features[0])
    check_names([str(value) for value in classes], ignore_case=True)
    return {ours: replace(part, data=_number(part.data, labels[ours], classes)) for ours, part in parts.items()}


def align_labels(split: Dataset, names: Sequence[str]) -> Dataset:
    """Renumber the labels of a split by a list of class names.

    Unlike `Dataset.align_labels_with_mapping`, which compares lower-cased names, this tells `A` from `a`.

    Args:
        split: data set with a `ClassLabel` column `label`.
        names: class names, among them those of the split.

    Raises:
        ValueError: a class of the split is missing in the names.
    """
    feature = split.features["label"]
    missing = [name for name in feature.names if name not in names]
    if missing:
        raise ValueError(f"The data set has classes {listed(missing[:5])}: expected only {listed(names)}.")
    return split if list(names) == feature.names else _number(split, feature.int2str(split["label"][:]), names)


def _number(data: Dataset, values: Sequence[Any], classes: Sequence[Any]) -> Dataset:
    """Replace the labels by the positions of `values` among `classes`."""
    ids = {value: index for index, value in enumerate(classes)}
    feature = ClassLabel(names=[str(value) for value in classes])
    return data.remove_columns("label").add_column("label", [ids[value] for value in values], feature=feature)


def _check_labels(values: Sequence[Any], feature: Any, split: str, ours: str) -> None:
    unlabelled = sum(
        value is None or value == -1 or (isinstance(value, str) and not value.strip()) for value in values
    )
    if unlabelled or not values:
        raise ValueError(
            f"The split '{split}' has no labels for {unlabelled} of its {len(values)} images: "
            f"choose a labelled one with {ours}_split or remove the images without a label."
        )
    if not isinstance(feature, ClassLabel):
        return
    strange = sorted({value for value in values if not 0 <= value < feature.num_classes})
    if strange:
        raise ValueError(
            f"The split '{split}' has labels {listed(strange[:5])} and its ClassLabel names {feature.num_classes} "
            f"classes: expected labels from 0 to {feature.num_classes - 1}, cast the column to a ClassLabel that "
            "names every class."
        )


def check_names(names: Sequence[str], ignore_case: bool) -> None:
    """Refuse class names that differ only in spaces, Unicode composition or, on request, letter case.

    Args:
        names: distinct class names.
        ignore_case: refusal of names that differ only in letter case: right where folders or strings stand for
            classes, not where a data set declares its classes (EMNIST has A and a).

    Raises:
        ValueError: two names are that similar.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFC", name).split())
        other = seen.setdefault(key.casefold() if ignore_case else key, name)
        if other != name:
            raise ValueError(
                f"The class names {other!r} and {name!r} differ only in letter case, spaces or accents' encoding: "
                "give images of one class one name, or names that differ in more to two classes."
            )


def check_trained(parts: Mapping[str, Part], is_sample: bool) -> None:
    """Refuse classes with images to validate or test on and none to train on.

    Args:
        parts: parts with encoded labels.
        is_sample: whether the training images are a sample of a stream, which may miss a class: then this warns.

    Raises:
        ValueError: there is such a class, and the training images are no sample.
    """
    labels = {ours: set(part.data["label"][:]) for ours, part in parts.items()}
    for ours, part in parts.items():
        missing = [part.data.features["label"].int2str(label) for label in sorted(labels[ours] - labels["train"])]
        if not missing:
            continue
        sentence = (
            f"The split '{part.stored.split}' has images of {len(missing)} classes without any training image "
            f"({listed(missing[:5])}{', ...' if len(missing) > 5 else ''}): "
        )
        if not is_sample:
            raise ValueError(
                f"{sentence}correct their labels, leave these images out, or name other splits with train_split and "
                f"{ours}_split."
            )
        logger.warning("%snone of them can be recognised; a larger stream_images holds more classes.", sentence)


def _sorted_classes(values: Sequence[Any], feature: Any) -> list[Any]:
    """Sort the distinct labels."""
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise ValueError(
            f"The label column holds {feature}: expected one whole number or one string for each image, the same type "
            "in every split, name another column with label_column (`--label_column_name`) or convert it."
        )
    return sorted(set(values))


def check_classes(train: Part, expected: int | None, path: Any) -> None:
    """Raise `ValueError` if the number of classes is not the expected one."""
    names = train.data.features["label"].names
    if expected is not None and len(names) != expected:
        shown = listed(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(
            f"The data set '{path}' has {len(names)} classes ({shown}) and its row of TRANSFER_TASKS says {expected}: "
            "it is not the data set that the row means; pass its Hub id and label_column (`--label_column_name`) to "
            "use it as it is."
        )
