"""Set the label mapping of a model, and slice its head to the mapped classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

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


def _slice_head(model: PromptedSparseModel, mapped: list[int]) -> None:
    model.gather_shards()
    config = copy.deepcopy(model.config)
    config.mapped_labels, config.label_mapping_state = mapped, "final"
    set_labels(config.backbone_config, config.id2label)
    sliced = model.rebuilt(config)
    sliced.load_state_dict(take_classes(model.state_dict(), sliced.state_dict(), mapped), assign=True)
    model.replace_with(sliced)
    if model.config.state == "search":
        model.update_masks()
    elif model.config.state == "frozen":
        model.config.sparsity = model.sparsity
