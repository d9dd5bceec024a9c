"""Carve a validation split and sample training rows, stratified by class."""

from __future__ import annotations

import logging
from math import ceil

import numpy as np

from .splits import Part

logger = logging.getLogger(__name__)


def check_sampling(shots: int | None, fraction: float | None) -> None:
    """Raise `ValueError` if the sampling arguments contradict each other."""
    if shots is not None and fraction is not None:
        raise ValueError(f"shots is {shots} and fraction is {fraction}: give one of the two.")


def carve(parts: dict[str, Part], name: str, fraction: float, seed: int) -> dict[str, Part]:
    """Move a stratified share of `train` to a new part; both keep the order of `train`."""
    train = parts["train"]
    labels = np.asarray(train.data["label"][:])
    class_name = train.data.features["label"].int2str
    counts = np.bincount(labels)
    if (counts == 1).any():
        raise ValueError(
            f"The class '{class_name(int(np.argmax(counts == 1)))}' has only one training image, so no {name} split "
            f"can be carved from the training split: name a split with {name}_split, add images or leave the class "
            "out."
        )
    size, num_classes = ceil(fraction * len(labels)), np.count_nonzero(counts)
    if min(size, len(labels) - size) < num_classes:
        smallest = class_name(int(np.argmin(np.where(counts > 0, counts, counts.max()))))
        raise ValueError(
            f"Carving {size} of {len(labels)} training images as the {name} split leaves less than one image per "
            f"class for {num_classes} classes (the smallest is '{smallest}' with {counts[counts > 0].min()}): change "
            f"validation_fraction (now {fraction}) or name a split with {name}_split."
        )
    from sklearn.model_selection import train_test_split

    kept, carved = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
    return {**parts, "train": train.select(kept), name: train.select(carved)}


def sample(train: Part, shots: int | None, fraction: float | None, seed: int) -> Part:
    """Keep `shots` training images per class, or a stratified share of them."""
    if shots is None and fraction is None:
        return train
    labels = np.asarray(train.data["label"][:])
    counts = np.bincount(labels)
    # RandomState and not Generator: its numbers are promised to stay the same in every version of numpy.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[labels[rows]]
    if shots is not None:
        if short := np.count_nonzero(counts[counts > 0] < shots):
            logger.warning("%d classes have fewer than %d training images; all of theirs are kept.", short, shots)
        return train.select(rows[rank < shots])
    size, num_classes = ceil(float(fraction or 1) * len(labels)), np.count_nonzero(counts)
    if size < num_classes:
        raise ValueError(
            f"fraction={fraction} keeps {size} of {len(labels)} training images, less than one for each of the "
            f"{num_classes} classes: use at least {num_classes / len(labels):.3g}."
        )
    return train.select(rows[np.argsort(rank / counts[labels[rows]], kind="stable")[:size]])
