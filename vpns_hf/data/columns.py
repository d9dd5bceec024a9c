"""Choose the image and label columns of a data set and encode its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from datasets import ClassLabel, Features, Image

from .images import RGB_IMAGE
from .splits import Part, listed


def require_columns(part: Part, hints: Mapping[str, str]) -> None:
    """Raise with the hint of a column that is not there."""
    for column, hint in hints.items():
        if column not in part.data.column_names:
            raise ValueError(
                f"The split '{part.stored.split}' has no column '{column}': its columns are "
                f"{listed(part.data.column_names)}, {hint}."
            )


def choose_columns(parts: dict[str, Part], image: str | None, label: str | None) -> dict[str, Part]:
    """The parts with columns `image` (RGB) and `label` only."""
    features = parts["train"].data.features
    image = image or _find_column(features, Image, ("image", "img"), "image")
    label = label or _find_column(features, ClassLabel, ("label", "labels", "fine_label", "target", "class"), "label")
    wanted = ((image, "image"), (label, "label"))
    renamed = {theirs: ours for theirs, ours in wanted if theirs != ours}

    def choose(part: Part) -> Part:
        require_columns(part, {column: f"name one of them with {what}_column" for column, what in wanted})
        data = part.data.select_columns([image, label]).rename_columns(renamed)
        return replace(part, data=data.cast_column("image", RGB_IMAGE))

    return {ours: choose(part) for ours, part in parts.items()}


def _find_column(features: Features, kind: type, usual_names: Sequence[str], what: str) -> str:
    """The only column of type `kind`, else the first of the usual names."""
    typed = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return typed[0]
    for column in usual_names:
        if column in (typed or features):
            return column
    raise ValueError(
        f"It is not clear which column holds the {what}s among {listed(features)}: name it with {what}_column."
    )


def encode_labels(parts: dict[str, Part]) -> dict[str, Part]:
    """The parts with one and the same `ClassLabel` for their labels."""
    labels = {ours: part.data["label"][:] for ours, part in parts.items()}
    for ours, values in labels.items():
        unlabelled = sum(value is None or value == -1 for value in values)
        if unlabelled or not values:
            raise ValueError(
                f"The split '{parts[ours].stored.split}' has no labels for {unlabelled} of its {len(values)} images: "
                f"choose a labelled one with {ours}_split or remove the images without a label."
            )
    features = {ours: part.data.features["label"] for ours, part in parts.items()}
    if isinstance(features["train"], ClassLabel) and all(each == features["train"] for each in features.values()):
        return parts
    for ours, feature in features.items():
        if isinstance(feature, ClassLabel):
            labels[ours] = feature.int2str(labels[ours])
    # Not `class_encode_column`: it numbers each split for itself, sorts 10 before 2, and rewrites the images.
    classes = _sorted_classes(list(chain.from_iterable(labels.values())), features["train"])
    ids = {value: index for index, value in enumerate(classes)}
    feature = ClassLabel(names=[str(value) for value in classes])
    return {
        ours: replace(
            part,
            data=part.data.remove_columns("label").add_column(
                "label", [ids[value] for value in labels[ours]], feature=feature
            ),
        )
        for ours, part in parts.items()
    }


def _sorted_classes(values: Sequence[Any], feature: Any) -> list[Any]:
    """The distinct labels in order."""
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise ValueError(
            f"The label column holds {feature}: expected one whole number or one string for each image, the same type "
            "in every split, name another column with label_column or convert it."
        )
    return sorted(set(values))


def check_classes(train: Part, expected: int | None, path: Any) -> None:
    """Raise if the classes are fewer than two or not as many as expected."""
    names = train.data.features["label"].names
    if expected is not None and len(names) != expected:
        shown = listed(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(
            f"The data set '{path}' has {len(names)} classes ({shown}) and its row of TRANSFER_TASKS says {expected}: "
            "it is not the data set that the row means; pass its Hub id and label_column to use it as it is."
        )
