"""Find images that cannot be decoded, and skip them on request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Image

from .images import RGB_IMAGE, CorruptImageError
from .splits import Part

logger = logging.getLogger(__name__)
CORRUPT_IMAGES = ("error", "skip")


def find_corrupt_images(split: Dataset, num_proc: int | None = None) -> dict[int, str]:
    """Decode every image of a split once and report those that cannot be used.

    Args:
        split: split of `load_transfer_dataset`, or any data set with an image column `image`.
        num_proc: number of processes; `datasets` caches their findings.

    Returns:
        Row number of each unusable image -> its file and the reason.
    """
    stored = split.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
    problems = stored.map(
        _problems, batched=True, batch_size=100, remove_columns="image", num_proc=num_proc, desc="Reading images"
    )
    return {row: problem for row, problem in enumerate(problems["problem"][:]) if problem}


def _problems(batch: Mapping[str, Any]) -> dict[str, list[str]]:
    return {"problem": [_problem(stored) for stored in batch["image"]]}


def _problem(stored: Mapping[str, Any] | None) -> str:
    if stored is None:
        return "there is no image in this row"
    try:
        RGB_IMAGE.decode_example(stored)
    except CorruptImageError as error:
        return str(error)
    return ""


def skip_corrupt(part: Part, num_proc: int | None) -> Part:
    """Drop the images that cannot be decoded, with a warning for each."""
    problems = find_corrupt_images(part.data, num_proc)
    for row, problem in problems.items():
        logger.warning("Left out: the image %s (%s).", part.stored.place(row), problem)
    if problems:
        logger.warning(
            "%d of the %d images of the split '%s' cannot be read and are left out.",
            len(problems),
            len(part.data),
            part.stored.split,
        )
    return part.select(np.setdiff1d(np.arange(len(part.data)), list(problems))) if problems else part
