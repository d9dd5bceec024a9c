"""Load or wrap a backbone as an image classifier with the labels of the task."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# Image processors and timm load where they are needed: timm alone takes as long to import as transformers' models.
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME

from ..hub import find_file, hub_kwargs
from ..pixels import PixelMap, measure_pixels
from ..saved_files import read_json
from . import packed_shards
from .backbone_config import check_backbone, check_backbone_values
from .checks import check_handed_over
from .configuration import PromptedSparseConfig
from .labels import labels_of, set_labels
from .loading import in_one_sentence, load_image_processor, no_larger_than
from .tensor_shapes import build_backbone
from .timm_backbones import without_repeated_arguments, wrap_timm_model

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


def load_backbone(
    backbone: str | nn.Module,
    labels: Mapping[int, str] | None,
    new_head: bool | None,
    image_processor: BaseImageProcessor | None,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, bool, BaseImageProcessor | None]:
    """Return the image classifier with the labels of the task, whether its head is new, and its image processor.

    Arguments and errors are those of [`PromptedSparseModel.from_backbone`]; without `labels` the backbone keeps its
    own.
    """
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)} only apply when the backbone is a Hub id or a folder.")
        model, missing = _as_classifier(backbone), set[str]()
        check_handed_over(model, config_of(model), _find_image_size(model.config, None, None))
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
        model = _with_new_head(model, head, labels or labels_of(model.config))
    elif labels is not None:
        set_labels(model.config, labels)
    return model, fresh, image_processor


def _download(name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, set[str]]:
    """Load a model, and the names of the weights that its checkpoint lacks."""

    def find(file: str) -> str | None:
        return find_file(name, file, kwargs)

    with in_one_sentence(name):
        config = _read_config(name, find, kwargs)
        # Refuses files that only point to weights in Git LFS.
        packed_shards.find_packed_files(name, find, kwargs.get("variant"))
        settings = {"dtype": torch.float32, "trust_remote_code": False} | kwargs
        if isinstance(config, transformers.TimmWrapperConfig):
            settings |= {"config": config}
        with no_larger_than(packed_shards.unpacked_size(find, kwargs.get("variant"))):
            model, info = AutoModelForImageClassification.from_pretrained(name, **settings, output_loading_info=True)
    return model, set(info["missing_keys"])


def _read_config(name: str, find: Callable[[str], str | None], kwargs: dict[str, Any]) -> PreTrainedConfig:
    """Read the configuration of an image classifier, and refuse what cannot be one."""
    with _no_config(name):
        path = find(CONFIG_NAME)
        stored = {} if path is None else read_json(Path(path))
    check_backbone_values(stored)
    with _no_config(name):
        config = AutoConfig.from_pretrained(name, **hub_kwargs(kwargs))
    _refuse_pruned(config, name)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{name} is a {config.model_type!r} model, and transformers has no image classifier of that type; pass "
            "the id of an image classification model."
        )
    if isinstance(config, transformers.TimmWrapperConfig) and config.model_args:
        config = without_repeated_arguments(config, name)
    check_backbone(config)
    return config


@contextmanager
def _no_config(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise type(error)(
            f"{name!r} is no local folder with a transformers or timm config.json, nor could it be read from the Hub "
            f"({reason}). Check the spelling, the network, and `hf auth login` for private and gated models."
        ) from error


def _refuse_pruned(config: PreTrainedConfig, name: str) -> None:
    if isinstance(config, PromptedSparseConfig):
        raise ValueError(
            f"{name} is a pruned model already, and no backbone: continue with it by "
            "`PromptedSparseModel.from_pretrained`, or pass the plain model that its `merge_and_unload()` returns."
        )


def find_image_processor(name: str, kwargs: Mapping[str, Any]) -> BaseImageProcessor | None:
    """Find the image processor of a model on the Hub or in a folder; None where there is none.

    Args:
        name: Hub id or folder.
        kwargs: arguments of `from_pretrained`, such as `revision` and `token`.

    Raises:
        ValueError: the file of the image processor is damaged, or describes none.
    """
    # Without one, size and normalisation come from the configuration or the caller; offline none may be cached.
    with suppress(OSError):
        if (image_processor := load_image_processor(name, kwargs)) is not None:
            return image_processor
    with suppress(OSError, ValueError):
        return transformers.AutoImageProcessor.from_pretrained(name, **hub_kwargs(kwargs))
    return None


def savable(image_processor: BaseImageProcessor | None) -> BaseImageProcessor | None:
    """Return the image processor if it can be saved as a file, else None."""
    # That of a timm model is part of the config.json of the model.
    return None if isinstance(image_processor, transformers.TimmWrapperImageProcessor) else image_processor


def _as_classifier(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        _refuse_pruned(model.config, type(model).__name__)
        if (
            type(model.config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
            or "ForImageClassification" not in type(model).__name__
        ):
            raise ValueError(
                f"{type(model).__name__} is no image classifier; pass a model whose output has one logit a label, "
                "such as one of `AutoModelForImageClassification`."
            )
        return model
    return wrap_timm_model(model)


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Copy the configuration of a model, so that the copy rebuilds this class.

    transformers modifies configurations that it is given.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if Path(config.name_or_path).is_dir():
        # Do not publish a path of this machine.
        config.name_or_path = Path(config.name_or_path).name
    return config


def head_parameters(model: PreTrainedModel) -> list[str]:
    """List the parameters whose shape depends on the number of labels."""
    labels = {index: str(index) for index in range(model.config.num_labels + 1)}
    try:
        with torch.device("meta"):
            wider = _rebuilt(model, labels)
    except RuntimeError:
        # Some timm models read values of tensors in their constructor.
        wider = _rebuilt(model, labels)
    shapes = {name: parameter.shape for name, parameter in wider.named_parameters()}
    return [name for name, parameter in model.named_parameters() if parameter.shape != shapes[name]]


def _with_new_head(model: PreTrainedModel, head: set[str], labels: Mapping[int, str]) -> PreTrainedModel:
    """Build the same model with a newly initialised head for these labels."""
    fresh = _rebuilt(model, labels).to(device=model.device, dtype=model.dtype).train(model.training)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in head}
    fresh.load_state_dict(kept | {name: tensor for name, tensor in fresh.state_dict().items() if name in head})
    return fresh


def _rebuilt(model: PreTrainedModel, labels: Mapping[int, str]) -> PreTrainedModel:
    """Build a model of the same class and configuration with newly initialised weights and other labels."""
    config = config_of(model)
    set_labels(config, labels)
    return build_backbone(config)


def height_width(size: Any) -> list[int] | None:
    """Convert a side, a pair or the size dictionary of an image processor to (height, width)."""
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
    """Find image size, mean and std: as passed, else of the image processor, else of timm or the configuration."""
    processor = image_processor.to_dict() if image_processor is not None else {}
    timm_cfg = config.to_dict().get("pretrained_cfg") or {}
    size = _find_image_size(config, image_processor, image_size)
    # A processor may hold one number for all channels; then both are measured.
    mean = _first_list(processor.get("image_mean"), timm_cfg.get("mean"))
    std = _first_list(processor.get("image_std"), timm_cfg.get("std"))
    pixels = _measured(image_processor, size) if image_processor is not None and size is not None else None
    if pixels is not None and not (mean and std and pixels.agrees(mean, std)):
        mean, std = list(pixels.mean), list(pixels.std)
    mean, std = (mean if image_mean is None else image_mean), (std if image_std is None else image_std)
    return {"image_size": size, "image_mean": mean and list(mean), "image_std": std and list(std)}


def _measured(image_processor: BaseImageProcessor, size: Sequence[int]) -> PixelMap | None:
    try:
        return measure_pixels(image_processor, size)
    except ValueError:
        return None  # No colour images: ImageTransforms refuses them, data sets of tensors may do without.


def _find_image_size(
    config: PreTrainedConfig, image_processor: BaseImageProcessor | None, passed: Sequence[int] | int | None
) -> list[int] | None:
    processor = image_processor.to_dict() if image_processor is not None else {}
    timm_size = (config.to_dict().get("pretrained_cfg") or {}).get("input_size")
    sizes = (
        passed,
        processor.get("crop_size") if processor.get("do_center_crop") else None,
        processor.get("size"),
        timm_size[1:] if timm_size else None,
        _configured_size(config),
    )
    found = (height_width(size) for size in sizes)
    return next((size for size in found if size), None)


def _configured_size(config: PreTrainedConfig) -> Any:
    """Return the image size of a configuration, which models of images and text keep in `vision_config`."""
    fields = config.to_dict()
    return fields.get("image_size") or (fields.get("vision_config") or {}).get("image_size")


def native_size(config: PreTrainedConfig) -> list[int] | None:
    """Return (height, width) for which a configuration builds position embeddings; None where it names no size."""
    return height_width(_configured_size(config))


def _first_list(*values: Any) -> Sequence[float] | None:
    return next((value for value in values if isinstance(value, list | tuple)), None)


def position_kwargs(backbone: PreTrainedModel, image_size: Sequence[int] | None) -> dict[str, bool]:
    """Return the argument by which the backbone interpolates its position embeddings, where it is needed."""
    native = native_size(backbone.config)
    if image_size is None or native is None or list(image_size) == native:
        return {}
    # Some classifiers pass the argument on to their embeddings among other keyword arguments.
    takers = backbone.modules() if _takes(backbone, "kwargs") else (backbone,)
    return (
        {"interpolate_pos_encoding": True} if any(_takes(part, "interpolate_pos_encoding") for part in takers) else {}
    )


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters
