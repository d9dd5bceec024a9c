"""Backbones with random weights that the benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vpns_hf import PromptedSparseModel

SPARSITY = 0.9
CLASSES = 100


def resnet18() -> PreTrainedModel:
    """ResNet-18: 11 million weights."""
    config = ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


def resnet50() -> PreTrainedModel:
    """ResNet-50: 24 million weights."""
    return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))


def _vit(hidden_size: int, heads: int, layers: int = 12) -> Callable[[], PreTrainedModel]:
    config = {"hidden_size": hidden_size, "num_attention_heads": heads, "num_hidden_layers": layers}
    return lambda: ViTForImageClassification(
        ViTConfig(**config, intermediate_size=4 * hidden_size, num_labels=CLASSES)
    )


VITS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit_tiny": _vit(192, 3),
    "vit_small": _vit(384, 6),
    "vit_base": _vit(768, 12),
    "vit_large": _vit(1024, 16, layers=24),
}
"""ViTs of 5, 22, 86 and 303 million weights, with patches of 16 pixels, for images of 224 pixels."""


def wrap(backbone: PreTrainedModel) -> PromptedSparseModel:
    """In the search state, with the prompt of the paper."""
    return PromptedSparseModel.from_backbone(
        backbone,
        sparsity=SPARSITY,
        prompt="pad",
        prompt_size=16,
        image_size=224,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
