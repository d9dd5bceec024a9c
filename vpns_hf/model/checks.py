"""Check the settings and the model that `from_backbone` is given, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .. import masking
from ..label_mapping import get_label_mapping

if TYPE_CHECKING:
    from .modeling import PromptedSparseModel


def check_settings(
    sparsity: float, label_mapping: str | None, new_head: bool | None, labels: Mapping[int, str] | None
) -> None:
    """Refuse settings of [`PromptedSparseModel.from_backbone`] that do not fit together.

    Raises:
        ValueError: a sparsity outside [0, 1], or a label mapping that is unknown, or has a new head or no labels.
    """
    if label_mapping is not None:
        get_label_mapping(label_mapping)
        if new_head or labels is None:
            raise ValueError(
                "A label mapping keeps the pretrained head: pass `num_labels` or `id2label` of the task, and no "
                "`new_head`."
            )
    masking.kept_count(0, sparsity)


def check_prunable(model: PromptedSparseModel) -> None:
    """Refuse a model without prunable weights.

    Raises:
        ValueError: there is none.
    """
    if not model.prunables():
        raise ValueError(
            f"{type(model.backbone).__name__} has no prunable weight: no linear or convolution layer outside "
            "`ignore_modules` and a new head."
        )


def check_image_size(model: PromptedSparseModel) -> None:
    """Run one black image of the configured size through the model.

    Raises:
        ValueError: the backbone does not accept it.
    """
    if model.config.image_size is None:
        return
    channels = len(model.config.image_mean) if model.config.image_mean else 3
    image = torch.zeros(1, channels, *model.config.image_size, device=model.device, dtype=model.dtype)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{type(model.backbone).__name__} does not accept images of {tuple(model.config.image_size)} (height, "
            f"width) with {channels} channels: {error}"
        ) from error
    model.train(training)
