"""Models that need no vpns_hf: folders that transformers and timm load, and ONNX files.

Whatever is written has been run before, on random images, and gives the logits of the model that it came from.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperForImageClassification
from transformers.utils import SAFE_WEIGHTS_NAME

from .configuration import PromptedSparseConfig
from .modeling import PromptedSparseModel
from .prompts import VisualPrompt
from .transforms import matching_image_processor

logger = logging.getLogger(__name__)

# Largest difference of logits, as a share of the largest logit, between a model and what was exported of it.
_TOLERANCE = 1e-4
# Largest difference of pixels in [0, 1] between two image processors that resize alike but round differently.
_PIXEL_TOLERANCE = 0.03
# A protobuf message, and so an ONNX file, ends at 2 GiB; weights beyond that lie in a file of their own.
_LARGEST_ONNX = 2**31 - 2**24
_TIMM_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


# Plain models --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_model(model: PromptedSparseModel, use_prompt: bool | None = None) -> PreTrainedModel:
    """The pruned backbone as a stock model of its own that gives the logits of `model`, which stays as it is.

    The zeros are written in. A label mapping that reads a head of all source classes is multiplied into the head, and
    with another image size than the backbone's own the position embeddings are interpolated to it.

    A prompt is folded into the position embeddings of a ViT where that is exact: where it does not overlap the image,
    which `prompt_inner_size` or the prompt `"expand"` shrink onto black. Such a model takes images that are shrunk
    and centred on black already; the image processor that [`export_plain`] writes does that.

    Args:
        model: in any state; in the search state its present masks are taken.
        use_prompt: whether the logits are those with the prompt; None: `model.config.use_prompt`.

    Returns:
        A model of the backbone's class in evaluation mode, on the CPU, of the dtype of `model`.

    Raises:
        ValueError: no stock model gives these logits, as with a prompt that overlaps the image; or there is no prompt.
    """
    use_prompt = _resolve_prompt(model, use_prompt)
    _say_what_is_lost(model, use_prompt)
    wrapped = copy.deepcopy(model).cpu().float().eval()
    images = _sample_images(wrapped.config)
    expected = wrapped(images, use_prompt=use_prompt).logits
    config, prompt, label_weights = wrapped.config, wrapped.prompt, _label_weights(wrapped)
    plain = _at_image_size(wrapped.merge_and_unload(), config)
    if label_weights is not None:
        plain = _with_labels(plain, config, label_weights)
    if use_prompt and prompt is not None:
        _fold_prompt(plain, prompt)
        images = _Placement(config, prompt)(images)
    _require_equal(plain(pixel_values=images).logits, expected, f"A plain {type(plain).__name__}")
    return plain.to(model.dtype)


def export_plain(
    model: PromptedSparseModel,
    folder: str | os.PathLike[str],
    image_processor: BaseImageProcessor | None = None,
    use_prompt: bool | None = None,
) -> None:
    """Write [`plain_model`] as a folder that stock transformers loads, without vpns_hf.

    A timm backbone is written in timm's own layout, which both `timm.create_model("local-dir:...", pretrained=True)`
    and transformers load; its preprocessing is part of `config.json`.

    Args:
        model: stays as it is.
        folder: new or empty; it appears complete or not at all.
        image_processor: the one that the model is evaluated with, written beside it. With a folded prompt it also
            shrinks the image and centres it on black; it then resizes once where `model` resizes twice, so pixels
            differ by rounding. None: only the model is written.
        use_prompt: whether the logits are those with the prompt; None: `model.config.use_prompt`.

    Raises:
        ValueError: no stock model gives these logits, or no stock image processor these images.
        FileExistsError: the folder holds files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder to export to.")
    use_prompt = _resolve_prompt(model, use_prompt)
    plain = plain_model(model, use_prompt)
    if image_processor is not None:
        image_processor = matching_image_processor(image_processor, *model.config.geometry)
        if use_prompt and model.prompt is not None:
            image_processor = _placing_processor(image_processor, _Placement(model.config, model.prompt))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".exporting-") as name:
        complete = Path(name) / "complete"
        if isinstance(plain, TimmWrapperForImageClassification):
            _save_timm(plain, complete, model.config, image_processor)
        else:
            plain.save_pretrained(complete)
            if image_processor is not None:
                image_processor.save_pretrained(complete)
        os.replace(complete, folder)


def _resolve_prompt(model: PromptedSparseModel, use_prompt: bool | None) -> bool:
    resolved = model.config.use_prompt if use_prompt is None else use_prompt
    if resolved and model.prompt is None:
        raise ValueError("`use_prompt=True`, but this model has no prompt.")
    return resolved


def _say_what_is_lost(model: PromptedSparseModel, use_prompt: bool) -> None:
    if model.config.use_prompt and not use_prompt:
        logger.warning(
            "This model is evaluated with its prompt, and the export leaves it out: its accuracy is that without the "
            "prompt."
        )


def _sample_images(config: PromptedSparseConfig, count: int = 2) -> Tensor:
    """Random normalised images, always the same: [count, channels, height, width]."""
    if config.image_size is None:
        raise ValueError(
            "The size of the model's images is not known; set `model.config.image_size = [height, width]`."
        )
    mean, std = (torch.tensor(values or [0.5] * 3).view(-1, 1, 1) for values in (config.image_mean, config.image_std))
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, len(mean), *config.image_size, generator=generator) - mean) / std


def _require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
    # Not `>`: NaN compares with nothing.
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{what} does not give the logits of this model (largest difference {difference:.2g}), so it was not "
            "written."
        )


def _rebuilt(plain: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """A model of the same class with changes in its configuration, and fresh weights."""
    config = copy.deepcopy(plain.config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        return type(plain)(config).eval()


def _at_image_size(plain: PreTrainedModel, config: PromptedSparseConfig) -> PreTrainedModel:
    """The model built for the images that it is evaluated on, position embeddings interpolated as it does it itself.

    Stock models interpolate only when a call asks for it, which a saved model cannot.
    """
    native = plain.config.to_dict().get("image_size")
    height, width = config.image_size or ()
    if native is None or native == height == width or list(np.broadcast_to(native, 2)) == [height, width]:
        return plain
    resized = _rebuilt(plain, image_size=height if height == width else [height, width])
    state = plain.state_dict()
    for name, target in resized.state_dict().items():
        if state[name].shape == target.shape:
            continue
        owner, _, tensor_name = name.rpartition(".")
        if tensor_name != "position_embeddings":
            raise ValueError(
                f"A stock {type(plain).__name__} takes images of {height} x {width} pixels only in calls with "
                f"`interpolate_pos_encoding=True`, which a saved model cannot ask for ({name} has another shape); "
                "export it to ONNX instead."
            )
        embeddings: Any = plain.get_submodule(owner)
        state[name] = embeddings.interpolate_pos_encoding(torch.empty_like(target), height, width)
    resized.load_state_dict(state)
    return resized


# Labels --------------------------------------------------------------------------------------------------------------


def _label_weights(model: PromptedSparseModel) -> Tensor | None:
    """The weight of each source class for each target class, [source, target], where the head has source classes."""
    config = model.config
    if config.label_mapping_state == "unset":
        return None
    if model.label_matrix is not None:
        return model.label_matrix
    if config.label_mapping_state == "final" and not config.keep_source_head:
        return None
    return F.one_hot(torch.tensor(config.mapped_labels), config.backbone_config.num_labels).T.float()


def _with_labels(plain: PreTrainedModel, config: PromptedSparseConfig, label_weights: Tensor) -> PreTrainedModel:
    """The model whose head gives `logits @ label_weights`, which is exact for a linear head."""
    mapped = _rebuilt(plain, id2label=dict(config.id2label), label2id=dict(config.label2id))
    sources = len(label_weights)

    def mix(tensor: Tensor) -> Tensor:
        dim = tensor.shape.index(sources)
        return torch.tensordot(label_weights.T, tensor, dims=([1], [dim])).movedim(0, dim)

    state = plain.state_dict()
    mapped.load_state_dict(state | {name: mix(state[name]) for name in config.head_parameters})
    return mapped


# Prompts -------------------------------------------------------------------------------------------------------------


class _Placement(VisualPrompt):
    """What a prompt does to an image besides adding itself: shrink it and centre it on black."""

    def __init__(self, config: PromptedSparseConfig, prompt: VisualPrompt):
        super().__init__(config)
        self.inner_size = prompt.inner_size

    def delta(self) -> Tensor:
        """Nothing: [channels, height, width] zeros."""
        return torch.zeros(len(self.mean), *self.image_size)


def _fold_prompt(plain: PreTrainedModel, prompt: VisualPrompt) -> None:
    """Add what the patch embedding makes of the prompt to the position embeddings.

    The patch embedding is linear in the pixels. Beside the image, on black, the prompt is a constant even after it is
    clamped; where it overlaps the image it is not.
    """
    delta = prompt.delta().float()
    image_area = prompt.place(torch.ones(1, 1, *prompt.image_size))[0] > 0
    if (delta * image_area).any():
        raise ValueError(
            "This prompt overlaps the image, so what it adds changes with the image, and no stock model holds it: "
            "export to ONNX, which builds the prompt in, or with `use_prompt=False`, which loses it."
        )
    projections = [part for part in plain.modules() if isinstance(part, nn.Conv2d) and part.in_channels == len(delta)]
    positions = [p for name, p in plain.named_parameters() if name.endswith(("position_embeddings", "pos_embed"))]
    if len(projections) != 1 or len(positions) != 1:
        raise ValueError(
            f"{type(plain).__name__} does not add position embeddings to patches as a ViT does, so the prompt cannot "
            "be folded into them: export to ONNX, which builds the prompt in, or with `use_prompt=False`, which loses "
            "it."
        )
    (projection,), (position,) = projections, positions
    normalised = delta.clamp(0, 1) / torch.tensor(prompt.std).view(-1, 1, 1)
    patches = F.conv2d(normalised[None], projection.weight, stride=projection.stride).flatten(2).transpose(1, 2)
    # Tokens that are no patches come first.
    position[:, position.shape[1] - patches.shape[1] :] += patches


def _placing_processor(image_processor: BaseImageProcessor, placement: _Placement) -> BaseImageProcessor:
    """The image processor that also shrinks images and centres them on black; cropping to more than there is pads."""
    (height, width), (inner_height, inner_width) = placement.image_size, placement.inner_size
    changes = {
        "size": {"height": inner_height, "width": inner_width},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    placing = type(image_processor).from_dict(image_processor.to_dict() | changes)
    picture = _sample_picture(placement.image_size)
    expected = placement(image_processor(picture, return_tensors="pt")["pixel_values"])
    if _pixel_difference(placing(picture, return_tensors="pt")["pixel_values"], expected) > _PIXEL_TOLERANCE:
        raise ValueError(
            f"This {type(image_processor).__name__} does more than to resize, so it cannot also shrink images for the "
            "prompt: export to ONNX, which does that itself, or without an image processor, and give the model images "
            "that are shrunk and centred on black."
        )
    return placing


def _sample_picture(image_size: tuple[int, int]) -> PILImage.Image:
    """A smooth picture with other proportions than the image size."""
    height, width = 2 * image_size[0] + 1, 3 * image_size[1] + 1
    down, right = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    return PILImage.fromarray(np.stack(np.broadcast_arrays(down, right, 255 - right), axis=2).astype(np.uint8))


def _pixel_difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    # Normalised by one and the same mean and std, values span a range that stands for all of [0, 1].
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


# timm ----------------------------------------------------------------------------------------------------------------


def _save_timm(
    plain: TimmWrapperForImageClassification,
    folder: Path,
    config: PromptedSparseConfig,
    image_processor: BaseImageProcessor | None,
) -> None:
    """Write `config.json` and `model.safetensors` as timm does."""
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
    """What an image processor does in the words of timm's `pretrained_cfg`."""
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
    picture = _sample_picture(image_size)
    expected = image_processor(picture, return_tensors="pt")["pixel_values"]
    if _pixel_difference(transform(picture)[None], expected) > _PIXEL_TOLERANCE:
        raise ValueError(
            f"timm has no preprocessing that does what this {type(image_processor).__name__} does; export without an "
            "image processor to keep the one of the pretrained model."
        )
    return found


# ONNX ----------------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    def __init__(self, model: PromptedSparseModel, use_prompt: bool):
        super().__init__()
        self.model, self.use_prompt = model, use_prompt

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, use_prompt=self.use_prompt).logits


@torch.no_grad()
def export_onnx(
    model: PromptedSparseModel,
    path: str | os.PathLike[str],
    use_prompt: bool | None = None,
    opset: int | None = None,
) -> None:
    """Write the model as an ONNX file, with its label mapping and, where it is used, its prompt built in.

    The graph maps `pixel_values` [batch, channels, height, width], normalised, float32, of any batch size to `logits`
    [batch, num_labels]. The metadata of the file hold `id2label`, `image_size`, `image_mean`, `image_std` and
    `use_prompt` as JSON. The file is run under onnxruntime before it takes its place. Needs the packages of
    `pip install "vpns-hf[onnx]"`.

    Args:
        model: in any state, of any dtype; stays as it is.
        path: the file; replaced if it is there. Weights of 2 GiB and more lie beside it, in `<path>.data`.
        use_prompt: whether the prompt is built in; None: `model.config.use_prompt`.
        opset: version of the ONNX operators; None: torch's choice.

    Raises:
        ImportError: the packages that ONNX needs are missing.
        ValueError: the file does not give the model's logits, or a prompt is asked for and there is none.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'ONNX needs more packages: `pip install "vpns-hf[onnx]"` ({error}).') from error
    path, use_prompt = Path(path), _resolve_prompt(model, use_prompt)
    _say_what_is_lost(model, use_prompt)
    wrapped = copy.deepcopy(model).cpu().float().eval()
    wrapped.merge_and_unload()  # masks would be written beside the weights
    images = _sample_images(wrapped.config, count=3)
    expected = wrapped(images, use_prompt=use_prompt).logits
    program = torch.onnx.export(
        _Logits(wrapped, use_prompt).eval(),
        # With a single image exporters take the batch size for a constant.
        (images[:2],),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # only the older exporter gives None
    program.model.metadata_props.update(_onnx_metadata(wrapped.config, use_prompt))
    size = sum(tensor.nbytes for tensor in wrapped.state_dict().values())
    with _written_whole(path) as temporary:
        program.save(temporary, external_data=size >= _LARGEST_ONNX)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            (logits,) = session.run(["logits"], {"pixel_values": images[:batch].numpy()})
            _require_equal(torch.from_numpy(logits), expected[:batch], "The ONNX file")


def _onnx_metadata(config: PromptedSparseConfig, use_prompt: bool) -> dict[str, str]:
    facts = {
        "id2label": config.id2label,
        "image_size": config.image_size,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "use_prompt": use_prompt,
    }
    return {name: json.dumps(value) for name, value in facts.items()}


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A path of the same name elsewhere; what is written there takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as name:
        yield Path(name) / path.name
        # The weights, where they are a file of their own, come first.
        for file in sorted(Path(name).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
