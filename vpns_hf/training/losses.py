"""Losses in place of the model's own, and MixUp and CutMix of training batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers.modeling_outputs import ImageClassifierOutput


def scoring_loss(compute_loss_func: Callable[..., Tensor] | None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Adapt Trainer's `compute_loss_func` to the logits and labels of one batch, for one-shot scores."""
    if compute_loss_func is None:
        return None

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        items = torch.tensor(len(labels), device=logits.device)
        return compute_loss_func(ImageClassifierOutput(logits=logits), labels, num_items_in_batch=items)

    return loss


def smoothed_loss(factor: float) -> Callable[..., Tensor]:
    """Return cross-entropy with label smoothing; unlike Trainer's, it takes class probabilities, as MixUp gives."""

    def loss(outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits.float(), labels, label_smoothing=factor)

    return loss


def mix_images(
    inputs: dict[str, Any], mixup_alpha: float, cutmix_alpha: float, num_labels: int, key: list[int]
) -> dict[str, Any]:
    """Apply MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899) to a batch, one by chance where both are asked for.

    Args:
        inputs: batch with `pixel_values` and `labels`.
        mixup_alpha, cutmix_alpha: parameters of the Beta distributions; 0 is off.
        num_labels: number of classes.
        key: whole numbers that determine the random numbers.
    """
    asked = [(v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)]
    mixers = [kind(alpha=alpha, num_classes=num_labels) for kind, alpha in asked if alpha > 0]
    if not mixers:
        return inputs
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        images, labels = v2.RandomChoice(mixers)(inputs["pixel_values"], inputs["labels"])
    return {**inputs, "pixel_values": images, "labels": labels}
