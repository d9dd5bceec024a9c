"""Backbones: a name, a folder, a timm model or a module becomes an image classifier with the wanted labels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

from ..hub import hub_kwargs


def load_backbone(
    backbone: str | nn.Module,
    labels: Mapping[int, str] | None,
    new_head: bool | None,
    image_processor: BaseImageProcessor | None,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, bool, BaseImageProcessor | None]:
    """The image classifier with the task's labels, whether its head is new, and its image processor if any.

    Arguments and errors as of [`PromptedSparseModel.from_backbone`]; without `labels` the backbone keeps its own.
    """
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)} only apply when the backbone is a Hub id or a folder.")
        model, missing = _as_classifier(backbone), set[str]()
    else:
        model, missing = _download(backbone, kwargs)
        image_processor = image_processor or find_image_processor(backbone, kwargs)
    head = set(head_parameters(model))
    if lost := sorted(missing - head):
        raise ValueError(
            f"{backbone} is no complete checkpoint of {type(model).__name__}: {len(lost)} weights are missing, such "
            f"as {lost[0]}."
        )
    fresh = bool(missing) or new_head is True or (labels is not None and len(labels) != model.config.num_labels)
    if fresh and new_head is False:
        raise ValueError(
            f"`new_head=False` keeps the pretrained head, but it has {model.config.num_labels} labels"
            + (f" and the task has {len(labels)}." if labels else " that the checkpoint does not hold.")
        )
    if fresh:
        model = _with_new_head(model, head, labels or model.config.id2label)
    elif labels is not None:
        set_labels(model.config, labels)
    return model, fresh, image_processor


def _download(name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the weights that its checkpoint lacks."""
    try:
        config = AutoConfig.from_pretrained(name, **hub_kwargs(kwargs))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise type(error)(
            f"{name!r} is no local folder with a transformers or timm config.json, nor could it be read from the Hub "
            f"({reason}). Check the spelling, the network, and `hf auth login` for private and gated models."
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, and transformers has no image classifier of that type; pass "
            "the id of an image classification model."
        )
    model, info = AutoModelForImageClassification.from_pretrained(
        name, **{"dtype": torch.float32, "trust_remote_code": False} | kwargs, output_loading_info=True
    )
    return model, set(info["missing_keys"])


def find_image_processor(name: str, kwargs: Mapping[str, Any]) -> BaseImageProcessor | None:
    """The image processor of a model on the Hub or in a folder, or None; `kwargs` as of `from_pretrained`."""
    try:
        return AutoImageProcessor.from_pretrained(name, **hub_kwargs(kwargs))
    except (OSError, ValueError):
        # Without one, size and normalisation come from the configuration or the caller.
        return None


def savable(image_processor: BaseImageProcessor | None) -> BaseImageProcessor | None:
    """The image processor if it can be saved on its own, else None."""
    # transformers keeps that of timm models in the model's config.json, and saves no file of its own.
    return None if isinstance(image_processor, TimmWrapperImageProcessor) else image_processor


def _as_classifier(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        if (
            type(model.config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
            or "ForImageClassification" not in type(model).__name__
        ):
            raise ValueError(
                f"{type(model).__name__} is no image classifier; pass a model whose output has one logit a label, "
                "such as one of `AutoModelForImageClassification`."
            )
        return model
    try:
        timm_model: Any = model
        pretrained_cfg, num_classes = dict(timm_model.pretrained_cfg), int(timm_model.num_classes)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} is neither a transformers image classifier nor a timm model; wrap it as one of "
            "them."
        ) from None
    config = TimmWrapperConfig.from_dict(
        {"architecture": pretrained_cfg["architecture"], "num_classes": num_classes, "pretrained_cfg": pretrained_cfg}
    )
    wrapper = TimmWrapperForImageClassification(config)
    try:
        wrapper.timm_model.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"This {config.architecture} was made with other arguments than timm's defaults; wrap it yourself with "
            "`TimmWrapperForImageClassification(TimmWrapperConfig(architecture=..., model_args={...}))`."
        ) from error
    return wrapper.to(next(model.parameters()).device)


def label_names(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str] | None:
    """The labels of the task by number, or None where neither their number nor their names are given.

    Raises:
        ValueError: both are given and do not fit.
    """
    if id2label is not None:
        if num_labels not in (None, len(id2label)):
            raise ValueError(
                f"`num_labels` is {num_labels}, but `id2label` names {len(id2label)} labels; pass one of them."
            )
        return {int(index): name for index, name in id2label.items()}
    return None if num_labels is None else {index: f"LABEL_{index}" for index in range(num_labels)}


def set_labels(config: PreTrainedConfig, labels: Mapping[int, str]) -> None:
    """Write the labels into a configuration, which counts them by their names."""
    config.id2label, config.label2id = dict(labels), {name: index for index, name in labels.items()}


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy that rebuilds this very class; transformers writes into the configurations that it is given."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if Path(config.name_or_path).is_dir():
        # Where it lies on this machine is of no use to others.
        config.name_or_path = Path(config.name_or_path).name
    return config


def head_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters whose shape follows the number of labels."""
    labels = {index: str(index) for index in range(model.config.num_labels + 1)}
    try:
        with torch.device("meta"):
            wider = _rebuilt(model, labels)
    except RuntimeError:
        # Some timm models read values of tensors while they are built.
        wider = _rebuilt(model, labels)
    shapes = {name: parameter.shape for name, parameter in wider.named_parameters()}
    return [name for name, parameter in model.named_parameters() if parameter.shape != shapes[name]]


def _with_new_head(model: PreTrainedModel, head: set[str], labels: Mapping[int, str]) -> PreTrainedModel:
    """The same model with a freshly initialised head for these labels."""
    fresh = _rebuilt(model, labels).to(device=model.device, dtype=model.dtype).train(model.training)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in head}
    fresh.load_state_dict(kept | {name: tensor for name, tensor in fresh.state_dict().items() if name in head})
    return fresh


def _rebuilt(model: PreTrainedModel, labels: Mapping[int, str]) -> PreTrainedModel:
    """A model of the same class and configuration with fresh weights and other labels."""
    config = config_of(model)
    set_labels(config, labels)
    return AutoModelForImageClassification.from_config(config, trust_remote_code=False)


def height_width(size: Any) -> list[int] | None:
    """(height, width) of a side, a pair, or an image processor's size dictionary."""
    if size is None:
        return None
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, Sequence):
        return [int(side) for side in size]
    if "height" in size and "width" in size:
        return [size["height"], size["width"]]
    return [size["shortest_edge"], size["shortest_edge"]] if "shortest_edge" in size else None


def image_geometry(
    config: PreTrainedConfig,
    image_processor: BaseImageProcessor | None,
    image_size: Sequence[int] | int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Image size, mean and std: as passed, else the processor's, else timm's or the backbone's configuration's."""
    processor = image_processor.to_dict() if image_processor is not None else {}
    timm_cfg = config.to_dict().get("pretrained_cfg") or {}
    timm_size = timm_cfg.get("input_size")
    sizes = (
        image_size,
        processor.get("crop_size") if processor.get("do_center_crop") else None,
        processor.get("size"),
        timm_size[1:] if timm_size else None,
        config.to_dict().get("image_size"),
    )
    found = (height_width(size) for size in sizes)
    return {
        "image_size": next((size for size in found if size), None),
        "image_mean": _first(image_mean, processor.get("image_mean"), timm_cfg.get("mean")),
        "image_std": _first(image_std, processor.get("image_std"), timm_cfg.get("std")),
    }


def _first(*values: Sequence[float] | None) -> list[float] | None:
    return next((list(value) for value in values if value is not None), None)


def position_kwargs(backbone: PreTrainedModel, image_size: Sequence[int] | None) -> dict[str, bool]:
    """Ask the backbone to interpolate its position embeddings when images have another size than its own."""
    native = height_width(backbone.config.to_dict().get("image_size"))
    if image_size is None or native is None or list(image_size) == native:
        return {}
    parameters = inspect.signature(backbone.forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
