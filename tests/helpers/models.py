"""Tiny randomly initialised members of every supported family."""

from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    MobileNetV2Config,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
    TimmWrapperConfig,
    ViTConfig,
)

from vpns_hf import PromptedSparseModel

TRANSFORMER = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)
SWIN = dict(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4)


def _timm(architecture: str, **model_args):
    cfg = dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3)
    return TimmWrapperConfig.from_dict(
        dict(architecture=architecture, num_classes=6, pretrained_cfg=cfg, model_args=model_args or None)
    )


CONFIGS = {
    "vit": lambda: ViTConfig(**TRANSFORMER, num_labels=6),
    "deit": lambda: DeiTConfig(**TRANSFORMER, num_labels=6, architectures=["DeiTForImageClassification"]),
    "dinov2": lambda: Dinov2Config(**TRANSFORMER, num_labels=6),
    "beit": lambda: BeitConfig(**TRANSFORMER, num_labels=6, use_mean_pooling=True),
    "swin": lambda: SwinConfig(**SWIN, num_labels=6),
    "swinv2": lambda: Swinv2Config(**SWIN, num_labels=6),
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
    ),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, num_labels=6),
    "mobilenet_v2": lambda: MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=6),
    "timm_vit": lambda: _timm("test_vit", img_size=32),
    "timm_resnet": lambda: _timm("test_resnet"),
    "timm_vgg": lambda: _timm("vgg11", mlp_ratio=0.01),
}


def tiny_backbone(family: str) -> PreTrainedModel:
    """An image classifier for 32x32 images with six labels, in eval mode."""
    return AutoModelForImageClassification.from_config(CONFIGS[family]()).eval()


def tiny_model(backbone: str | PreTrainedModel = "vit", **kwargs) -> PromptedSparseModel:
    """The same, wrapped; by default half of each layer is pruned, so that gradients pass everywhere."""
    settings = (
        dict(sparsity=0.5, scope="layer", prompt_size=4, image_size=32, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        | kwargs
    )
    if isinstance(backbone, str):
        backbone = tiny_backbone(backbone)
    return PromptedSparseModel.from_backbone(backbone, **settings).eval()
