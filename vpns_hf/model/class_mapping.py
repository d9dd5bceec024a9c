"""Set the label mapping of a model, and slice its head to the mapped classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..masking.prunable import scores_name
from ..values import FLAG, checked
from .head import checked_classes, checked_matrix, take_classes
from .labels import set_labels

if TYPE_CHECKING:
    from .modeling import PromptedSparseModel


@checked(final=FLAG)
def map_classes(model: PromptedSparseModel, mapping: Tensor | Sequence[int], final: bool) -> None:
    """Set a label mapping; see [`PromptedSparseModel.set_label_mapping`].

    Raises:
        ValueError: the model takes no label mapping, or this one does not fit.
    """
    config = model.config
    if config.label_mapping is None or config.label_mapping_state == "final":
        raise ValueError(
            "This model takes no label mapping: it was built without `label_mapping`, or a final one is already set."
        )
    if model.label_matrix is not None:
        model.label_matrix.copy_(checked_matrix(mapping, model.label_matrix.shape))
    else:
        mapped = checked_classes(mapping, config.num_labels, config.backbone_config.num_labels)
        if final and not config.keep_source_head:
            return _slice_head(model, mapped)
        config.mapped_labels = mapped
    config.label_mapping_state = "final" if final else "open"


def _group_scores(model: PromptedSparseModel, mapped: list[int]) -> dict[str, Tensor]:
    """Return the learned scores of groups that span several classes, for the mapped ones, by name in the state."""
    if not model.pattern.spans_rows:
        return {}
    weights, rows = model.prunable_weights(), torch.tensor(mapped, device=model.device)
    return {
        f"backbone.{scores_name(name)}": model.pattern.take_rows(scores.detach(), weights[name].shape, rows)
        for name, scores in model.scores().items()
        if name in model.config.head_parameters
    }


def _slice_head(model: PromptedSparseModel, mapped: list[int]) -> None:
    model.gather_shards()
    if model.config.state == "frozen" and not model.pattern.frees_rows and model.sparsity:
        raise ValueError(
            f"The masks are frozen in the pattern {model.pattern.name!r}, and a label mapping would cut through them "
            "in the head; set it before `freeze_masks()`, or build the model with `keep_source_head=True`."
        )
    config = copy.deepcopy(model.config)
    config.mapped_labels, config.label_mapping_state = mapped, "final"
    set_labels(config.backbone_config, config.id2label)
    sliced = model.rebuilt(config)
    state = model.state_dict() | _group_scores(model, mapped)
    sliced.load_state_dict(take_classes(state, sliced.state_dict(), mapped), assign=True)
    model.replace_with(sliced)
    if model.config.state == "search":
        model.update_masks()
    elif model.config.state == "frozen":
        model.config.sparsity = model.sparsity
