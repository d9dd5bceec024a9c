"""Apply a label mapping to the logits and the weights of a classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..values import shortened
from .configuration import PromptedSparseConfig

_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def checked_matrix(mapping: Tensor | Sequence[int], shape: torch.Size) -> Tensor:
    """Check a Bayesian label mapping for a label matrix of a shape, and return it.

    Raises:
        ValueError: it has another shape, or values that are not finite.
    """
    matrix = _as_tensor(mapping)
    if matrix.shape != shape or not matrix.isfinite().all():
        raise ValueError(
            f"A Bayesian label mapping needs finite weights of shape {tuple(shape)}, [source, target]; got shape "
            f"{tuple(matrix.shape)} or values that are not finite."
        )
    return matrix


def _as_tensor(mapping: Any) -> Tensor:
    try:
        return torch.as_tensor(mapping)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The label mapping is {shortened(mapping)}; expected a tensor or a list of numbers."
        ) from error


def checked_classes(mapping: Tensor | Sequence[int], num_target: int, num_source: int) -> list[int]:
    """Check a one-to-one label mapping, and return the source class of each target class.

    Raises:
        ValueError: it does not name one source class for each of them.
    """
    mapped = _as_tensor(mapping)
    is_whole = mapped.shape == (num_target,) and mapped.dtype in _WHOLE_NUMBERS
    if not is_whole or not ((mapped >= 0) & (mapped < num_source)).all():
        raise ValueError(
            f"A label mapping needs one source class in [0, {num_source}) for each of the {num_target} target "
            f"classes; got {mapped.tolist()}."
        )
    return mapped.tolist()


def map_logits(logits: Tensor, config: PromptedSparseConfig, label_matrix: Tensor | None) -> Tensor:
    """Map the logits of the head to target logits [n, num_labels]; unchanged until a mapping is set."""
    if config.label_mapping_state == "unset":
        return logits
    if label_matrix is not None:
        # Autocast would round the weights to half precision.
        with torch.autocast(logits.device.type, enabled=False):
            return (logits.float() @ label_matrix.float()).to(logits.dtype)
    reads_source_head = config.label_mapping_state == "open" or config.keep_source_head
    return logits[:, config.mapped_labels] if reads_source_head else logits


def take_classes(state: Mapping[str, Tensor], like: Mapping[str, Tensor], classes: Sequence[int]) -> dict[str, Tensor]:
    """Slice the head in the state of a model to some of its classes.

    Args:
        state: state dictionary of the model with all classes.
        like: state dictionary of a model with only these classes, for the shapes.
        classes: indices of the classes to keep, in their new order.
    """
    return {name: _take_rows(tensor, like[name].shape, classes) for name, tensor in state.items()}


def _take_rows(tensor: Tensor, shape: torch.Size, rows: Sequence[int]) -> Tensor:
    for dim, (current, target) in enumerate(zip(tensor.shape, shape, strict=True)):
        if current != target:
            return tensor.index_select(dim, torch.tensor(rows, device=tensor.device))
    return tensor


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Compute the mean cross-entropy, binary for `multi_label_classification`.

    Args:
        logits: logits [n, classes].
        labels: class ids [n], class probabilities [n, classes], or zeros and ones [n, classes] for several labels.
        problem_type: `problem_type` of the backbone's configuration.
    """
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels)
