"""Choose training images that one-shot scores are measured on."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .batches import with_labels


def calibration_batches(
    dataset: Any,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    images_per_class: int,
    num_labels: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Draw calibration images, balanced over the classes, in batches of sizes as equal as they can be.

    Images are read in random order until there are enough of every class.

    Args:
        dataset: map-style data set of training images, usually not augmented.
        collate: function that makes a batch with `labels` of examples.
        images_per_class: images of each class, or all of a class that has fewer.
        num_labels: number of classes.
        batch_size: largest number of images in a batch.
        seed: seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    seen, chosen = collections.Counter[int](), []
    for index in torch.randperm(len(dataset), generator=generator).tolist():
        example = dataset[index]
        labels = with_labels(collate([example]))["labels"]
        label = int(labels.argmax(-1) if labels.is_floating_point() else labels)
        if seen[label] < images_per_class:
            seen[label] += 1
            chosen.append(example)
        if len(chosen) == images_per_class * num_labels:
            break
    parts = np.array_split(np.arange(len(chosen)), math.ceil(len(chosen) / batch_size))
    return [with_labels(collate([chosen[index] for index in part])) for part in parts]
