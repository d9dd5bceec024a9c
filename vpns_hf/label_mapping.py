"""Map the source classes of a pretrained head to target classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .values import one_of, require, shortened


def _random(counts: Tensor) -> Tensor:
    """Draw distinct source classes from torch's global generator."""
    _require_enough_sources(counts)
    return torch.randperm(counts.shape[0])[: counts.shape[1]]


def _frequency(counts: Tensor) -> Tensor:
    """Match one to one and greedily, the most frequent (source, target) pair first."""
    _require_enough_sources(counts)
    flat, targets = counts.flatten(), counts.shape[1]
    source_of, taken = [-1] * targets, set[int]()
    for index in flat.argsort(descending=True, stable=True)[: int((flat > 0).sum())].tolist():
        source, target = divmod(index, targets)
        if source_of[target] < 0 and source not in taken:
            source_of[target] = source
            taken.add(source)
    return _with_left_over_sources(torch.tensor(source_of), counts.shape[0])


def _optimal(counts: Tensor) -> Tensor:
    """Match one to one with the highest total count."""
    from scipy.optimize import linear_sum_assignment

    _require_enough_sources(counts)
    targets, sources = linear_sum_assignment(counts.T.numpy(), maximize=True)
    mapping = torch.full((counts.shape[1],), -1)
    mapping[torch.as_tensor(targets)] = torch.as_tensor(sources)
    mapping[counts[mapping, torch.arange(counts.shape[1])] == 0] = -1
    return _with_left_over_sources(mapping, counts.shape[0])


def _bayesian(counts: Tensor) -> Tensor:
    """Weight all source classes for each target class, uniformly for a target class without counts."""
    # The smoothing of 1 is the paper's.
    weights = counts / (counts.sum(1, keepdim=True) + 1)
    totals = weights.sum(0)
    return torch.where(totals > 0, weights / totals, 1 / counts.shape[0]).float()


def _require_enough_sources(counts: Tensor) -> None:
    sources, targets = counts.shape
    if sources < targets:
        raise ValueError(
            f"A one-to-one label mapping needs at least as many source as target classes, but there are {sources} and "
            f'{targets}; use `label_mapping="bayesian"`, or a new head (`label_mapping=None`).'
        )


def _with_left_over_sources(mapping: Tensor, num_source: int) -> Tensor:
    """Give every target class that still has -1 a source class that no other has, the lowest first."""
    free = torch.ones(num_source, dtype=torch.bool)
    free[mapping[mapping >= 0]] = False
    unmapped = mapping < 0
    mapping[unmapped] = free.nonzero().flatten()[: int(unmapped.sum())]
    return mapping


LABEL_MAPPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": _random,
    "frequency": _frequency,
    "optimal": _optimal,
    "iterative": _frequency,
    "bayesian": _bayesian,
}


def get_label_mapping(name: str) -> Callable[[Tensor], Tensor]:
    """Return the label mapping of a name.

    Raises:
        ValueError: there is none.
    """
    require("label_mapping", name, one_of(LABEL_MAPPINGS))
    return LABEL_MAPPINGS[name]


def map_labels(counts: Tensor, method: str = "frequency") -> Tensor:
    """Choose the source class, or the weights of all source classes, for every target class.

    Args:
        counts: tensor [source, target] on any device, the number of images of each target class that the pretrained
            model predicted as each source class. Fractions, as of summed probabilities, are fine.
        method: name of the mapping, one of

            - `"random"` (RLM): distinct source classes, drawn from torch's global generator.
            - `"frequency"` (FLM; Chen et al., arXiv 2211.11635): one to one; the most frequent pair is matched first,
              ties in the order of the flat index.
            - `"optimal"`: one to one, with the highest possible total count. Where several matchings reach it, the
              same one comes back every time.
            - `"iterative"` (ILM, the same paper): the matching of `"frequency"`, which the caller updates during
              training.
            - `"bayesian"` (BLM; Cai et al., NeurIPS 2024): weights [source, target],
              `counts / (1 + counts of the source class)`, scaled so that each target class's weights sum to 1.

    Returns:
        LongTensor of one distinct source class for each target class, or, for `"bayesian"`, a FloatTensor
        [source, target]; on the CPU. A target class without counts gets the lowest source class that is left over, or
        uniform weights.

    Raises:
        ValueError: an unknown method, counts of another shape, negative or not finite, or fewer source than target
            classes for a one-to-one mapping.
    """
    mapping = get_label_mapping(method)
    if not isinstance(counts, Tensor) or counts.is_complex():
        raise ValueError(f"Counts are {shortened(counts)}; expected a tensor of real numbers [source, target].")
    if counts.dim() != 2 or counts.numel() == 0:
        raise ValueError(f"Counts must have the shape [source, target] and no empty side; got {tuple(counts.shape)}.")
    # float64 holds every count of images exactly; scipy takes CPU arrays only.
    counts = counts.detach().cpu().double()
    if not (counts.isfinite() & (counts >= 0)).all():
        raise ValueError("Counts must be finite and not negative.")
    return mapping(counts)


def count_predictions(pairs: Iterable[tuple[Tensor, Tensor]], num_source: int, num_target: int) -> Tensor:
    """Count the predictions of each source class on the images of each target class.

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
