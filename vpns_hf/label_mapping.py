"""Label mapping: which source class of a pretrained head stands for which target class."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def _frequency(counts: Tensor) -> Tensor:
    """Greedy one-to-one matching: the most frequent (source, target) pair first; ties go to the lower flat index."""
    counts = counts.clone()
    mapping = torch.full((counts.shape[1],), -1)
    for _ in range(counts.shape[1]):
        source, target = divmod(int(counts.argmax()), counts.shape[1])
        mapping[target] = source
        counts[source, :] = -1
        counts[:, target] = -1
    return mapping


LABEL_MAPPINGS: dict[str, Callable[[Tensor], Tensor]] = {"frequency": _frequency}


def get_label_mapping(name: str) -> Callable[[Tensor], Tensor]:
    """The label mapping of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in LABEL_MAPPINGS:
        raise ValueError(f"`label_mapping` is {name!r}; expected None or one of {', '.join(LABEL_MAPPINGS)}.")
    return LABEL_MAPPINGS[name]


def map_labels(counts: Tensor, method: str = "frequency") -> Tensor:
    """Choose a source class for every target class.

    Args:
        counts: integer tensor [source, target]: how often the pretrained model predicted that source class on images
            of that target class.
        method: `"frequency"`, the greedy one-to-one matching of the most frequent pairs (FLM; Chen et al., arXiv
            2211.11635).

    Returns:
        LongTensor of one distinct source class per target class.

    Raises:
        ValueError: an unknown method, or fewer source than target classes.
    """
    mapping = get_label_mapping(method)
    if counts.shape[0] < counts.shape[1]:
        raise ValueError(
            "A one-to-one label mapping needs at least as many source as target classes; there are "
            f"{counts.shape[0]} and "
            f"{counts.shape[1]}. Use a new head instead (`label_mapping=None`)."
        )
    return mapping(counts)


def count_predictions(pairs: Iterable[tuple[Tensor, Tensor]], num_source: int, num_target: int) -> Tensor:
    """How often each source class was predicted on the images of each target class.

    Args:
        pairs: batches of (predicted source classes, target classes), integer tensors [n].

    Returns:
        LongTensor [num_source, num_target].
    """
    counts = torch.zeros(num_source, num_target, dtype=torch.long)
    for predicted, labels in pairs:
        ones = torch.ones(len(predicted), dtype=torch.long)
        counts.index_put_((predicted.cpu(), labels.cpu()), ones, accumulate=True)
    return counts
