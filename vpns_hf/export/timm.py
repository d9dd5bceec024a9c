"""Save a pruned model as a timm folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm.data
from safetensors.torch import save_file
from transformers import BaseImageProcessor, TimmWrapperForImageClassification
from transformers.utils import SAFE_WEIGHTS_NAME

from ..model.configuration import PromptedSparseConfig
from .folding import PIXEL_TOLERANCE, pixel_difference, sample_picture

_TIMM_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def save_timm(
    plain: TimmWrapperForImageClassification,
    folder: Path,
    config: PromptedSparseConfig,
    image_processor: BaseImageProcessor | None,
) -> None:
    """Write `config.json` and `model.safetensors` in the layout of timm."""
    timm_config = copy.deepcopy(plain.config)
    # Where the pretrained weights came from, and how they were converted, is not true of these.
    timm_config.pretrained_cfg = {
        name: value
        for name, value in dict(timm_config.pretrained_cfg).items()
        if name not in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset")
    }
    if image_processor is not None:
        timm_config.pretrained_cfg |= _timm_preprocessing(image_processor, config)
    timm_config.model_args = timm_config.model_args or {}
    timm_config.architectures, timm_config.dtype = [type(plain).__name__], plain.dtype
    timm_config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in plain.timm_model.state_dict().items()}
    save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def _timm_preprocessing(image_processor: BaseImageProcessor, config: PromptedSparseConfig) -> dict[str, Any]:
    """Translate an image processor into fields of timm's `pretrained_cfg`."""
    settings, (image_size, mean, std) = image_processor.to_dict(), config.geometry
    size = settings["size"]
    keeps_proportions = "shortest_edge" in size
    resized = size["shortest_edge"] if keeps_proportions else size["height"]
    found: dict[str, Any] = {
        "input_size": [len(mean), *image_size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": _TIMM_INTERPOLATIONS.get(int(settings["resample"]), "bilinear"),
        # timm rounds image size / crop_pct down.
        "crop_pct": image_size[0] / (resized + 0.5),
        "crop_mode": "center" if keeps_proportions else "squash",
    }
    transform = timm.data.create_transform(**timm.data.resolve_data_config(found))
    picture = sample_picture(image_size)
    expected = image_processor(picture, return_tensors="pt")["pixel_values"]
    if pixel_difference(transform(picture)[None], expected) > PIXEL_TOLERANCE:
        raise ValueError(
            f"timm has no preprocessing that equals this {type(image_processor).__name__}; export without an "
            "image processor to keep the one of the pretrained model."
        )
    return found
