"""Export a pruned model as a stock transformers model."""

from __future__ import annotations

import copy
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperForImageClassification

from ..data.transforms import matching_image_processor
from ..model.backbones import native_size
from ..model.configuration import PromptedSparseConfig
from ..model.modeling import PromptedSparseModel
from ..model.tensor_shapes import build_backbone
from ..saved_folder import share_files
from ..values import FLAG, instance_of, optional, require
from .folding import Placement, fold_prompt, placing_processor
from .timm import save_timm

logger = logging.getLogger(__name__)
# Largest difference of logits, as a share of the largest logit, between a model and what was exported of it.
_TOLERANCE = 1e-4


@torch.no_grad()
def plain_model(model: PromptedSparseModel, use_prompt: bool | None = None) -> PreTrainedModel:
    """Build a stock model of the pruned backbone that gives the logits of `model`.

    The zeros are written in. A label mapping that reads a head of all source classes is multiplied into the head, and
    with another image size than the backbone's own the position embeddings are interpolated to it.

    A prompt is folded into the position embeddings of a ViT where that is exact: where it does not overlap the image,
    which `prompt_inner_size` or the prompt `"expand"` shrink onto black. Such a model takes images that are shrunk
    and centred on black already; the image processor that [`export_plain`] writes does that.

    Args:
        model: model in any state, with its current masks in the search state; not modified.
        use_prompt: whether the logits are those with the prompt; None: `model.config.use_prompt`.

    Returns:
        A model of the backbone's class in evaluation mode, on the CPU, of the dtype of `model`.

    Raises:
        ValueError: no stock model gives these logits, as with a prompt that overlaps the image; or there is no prompt.
    """
    use_prompt = resolve_prompt(model, use_prompt)
    warn_of_lost_prompt(model, use_prompt)
    wrapped = copy.deepcopy(model).cpu().float().eval()
    images = sample_images(wrapped.config)
    expected = wrapped(images, use_prompt=use_prompt).logits
    config, prompt, label_weights = wrapped.config, wrapped.prompt, _label_weights(wrapped)
    plain = _at_image_size(wrapped.merge_and_unload(), config)
    if label_weights is not None:
        plain = _with_labels(plain, config, label_weights)
    if use_prompt and prompt is not None:
        fold_prompt(plain, prompt)
        images = Placement(config, prompt)(images)
    require_equal(plain(pixel_values=images).logits, expected, f"A plain {type(plain).__name__}")
    return plain.to(model.dtype)


def export_plain(
    model: PromptedSparseModel,
    folder: str | os.PathLike[str],
    image_processor: BaseImageProcessor | None = None,
    use_prompt: bool | None = None,
) -> None:
    """Write [`plain_model`] as a folder that stock transformers loads without vpns_hf.

    A timm backbone is written in timm's own layout, which both `timm.create_model("local-dir:...", pretrained=True)`
    and transformers load; its preprocessing is part of `config.json`.

    Args:
        model: model in any state; not modified.
        folder: new or empty folder; it appears complete or not at all.
        image_processor: image processor that the model is evaluated with, written beside it. With a folded prompt it
            also shrinks the image and centres it on black; it then resizes once where `model` resizes twice, so
            pixels differ by rounding. None: only the model is written.
        use_prompt: whether the logits are those with the prompt; None: `model.config.use_prompt`.

    Raises:
        ValueError: no stock model gives these logits, or no stock image processor these images.
        FileExistsError: the folder holds files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder to export to.")
    use_prompt = resolve_prompt(model, use_prompt)
    plain = plain_model(model, use_prompt)
    if "tensor_shapes" in plain.config.to_dict():
        raise ValueError(
            f"The layers of this {type(plain).__name__} were cut, and no stock model builds layers of such sizes; "
            "export it to ONNX instead."
        )
    if image_processor is not None:
        image_processor = matching_image_processor(image_processor, *model.config.geometry)
        if use_prompt and model.prompt is not None:
            image_processor = placing_processor(image_processor, Placement(model.config, model.prompt))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".exporting-") as name:
        complete = Path(name) / "complete"
        if isinstance(plain, TimmWrapperForImageClassification):
            save_timm(plain, complete, model.config, image_processor)
        else:
            plain.save_pretrained(complete)
            if image_processor is not None:
                image_processor.save_pretrained(complete)
        share_files(complete)
        os.replace(complete, folder)


def resolve_prompt(model: PromptedSparseModel, use_prompt: bool | None) -> bool:
    """Decide whether the export applies the prompt, and raise if there is none to apply, or no model."""
    require("model", model, instance_of(PromptedSparseModel))
    require("use_prompt", use_prompt, optional(FLAG))
    resolved = model.config.use_prompt if use_prompt is None else use_prompt
    if resolved and model.prompt is None:
        raise ValueError("`use_prompt=True`, but this model has no prompt.")
    return resolved


def warn_of_lost_prompt(model: PromptedSparseModel, use_prompt: bool) -> None:
    """Warn if the export leaves out the prompt that the model applies by default."""
    if model.config.use_prompt and not use_prompt:
        logger.warning(
            "This model is evaluated with its prompt, and the export leaves it out: its accuracy is that without the "
            "prompt."
        )


def sample_images(config: PromptedSparseConfig, count: int = 2) -> Tensor:
    """Draw random normalised images with a fixed seed: [count, channels, height, width]."""
    if config.image_size is None:
        raise ValueError(
            "The size of the model's images is not known; set `model.config.image_size = [height, width]`."
        )
    mean, std = (torch.tensor(values or [0.5] * 3).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, len(mean), *config.image_size, generator=generator) - mean) / std


def require_equal(found: Tensor, expected: Tensor, export: str) -> None:
    """Refuse exported outputs that differ from those of the model by more than the tolerance.

    Raises:
        ValueError: they differ.
    """
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
    # Not `>`: NaN compares with nothing.
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{export} does not give the logits of this model (largest difference {difference:.2g}), so it was not "
            "written."
        )


def _rebuilt(plain: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """Build a model of the same class with changes in its configuration and newly initialised weights."""
    config = copy.deepcopy(plain.config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        return build_backbone(config).eval()


def _at_image_size(plain: PreTrainedModel, config: PromptedSparseConfig) -> PreTrainedModel:
    """Rebuild a model for its image size, with position embeddings interpolated by its own method.

    Stock models interpolate only in calls that request it, which a saved model cannot do.
    """
    native = native_size(plain.config)
    height, width = config.image_size or ()
    if native is None or native == [height, width]:
        return plain
    if "image_size" not in plain.config.to_dict():
        raise _unsavable_size(plain, height, width, "its size is part of `vision_config`")
    resized = _rebuilt(plain, image_size=height if height == width else [height, width])
    state = plain.state_dict()
    for name, target in resized.state_dict().items():
        if state[name].shape == target.shape:
            continue
        owner, _, tensor_name = name.rpartition(".")
        if tensor_name != "position_embeddings":
            raise _unsavable_size(plain, height, width, f"{name} has another shape")
        embeddings: Any = plain.get_submodule(owner)
        state[name] = embeddings.interpolate_pos_encoding(torch.empty_like(target), height, width)
    resized.load_state_dict(state)
    return resized


def _unsavable_size(plain: PreTrainedModel, height: int, width: int, reason: str) -> ValueError:
    return ValueError(
        f"A stock {type(plain).__name__} takes images of {height} x {width} pixels only in calls with "
        f"`interpolate_pos_encoding=True`, which a saved model cannot request ({reason}); export it to ONNX instead."
    )


def _label_weights(model: PromptedSparseModel) -> Tensor | None:
    """Return the weights of source for target classes, [source, target]; None where the head has target classes."""
    config = model.config
    if config.label_mapping_state == "unset":
        return None
    if model.label_matrix is not None:
        return model.label_matrix
    if config.label_mapping_state == "final" and not config.keep_source_head:
        return None
    return F.one_hot(torch.tensor(config.mapped_labels), config.backbone_config.num_labels).T.float()


def _with_labels(plain: PreTrainedModel, config: PromptedSparseConfig, label_weights: Tensor) -> PreTrainedModel:
    """Multiply label weights into a linear head, so that it gives `logits @ label_weights`."""
    mapped = _rebuilt(plain, id2label=dict(config.id2label), label2id=dict(config.label2id))
    sources = len(label_weights)

    def mix(tensor: Tensor) -> Tensor:
        dim = tensor.shape.index(sources)
        return torch.tensordot(label_weights.T, tensor, dims=([1], [dim])).movedim(0, dim)

    state = plain.state_dict()
    mapped.load_state_dict(state | {name: mix(state[name]) for name in config.head_parameters})
    return mapped
