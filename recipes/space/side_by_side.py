"""Classify one image by a dense and a pruned model, timed in turns, and show what they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from subnetworks import Models, Subnetwork
from torch import Tensor

from vpns_hf import PromptedSparseModel
from vpns_hf.data.images import RGB_IMAGE
from vpns_hf.inference import Spread, time_in_turns
from vpns_hf.inference.kernels import DENSE
from vpns_hf.report.density import density_figure
from vpns_hf.report.tables import file_size, milliseconds

# Width in inches at which the figure can be read on a telephone.
_FIGURE_WIDTH = 4.8
_PICTURE_SIDE = 256
_ROUNDS = 21


@dataclass(frozen=True)
class Column:
    """One side of the comparison.

    Args:
        heading: which model it is.
        probabilities: by label.
        milliseconds: time of the model for this image, median and quartiles.
        size: bytes of its weights.
        stored: how they are stored.
    """

    heading: str
    probabilities: dict[str, float]
    milliseconds: Spread
    size: int
    stored: str

    def facts(self) -> str:
        """Format heading, time and size as Markdown."""
        median, lower, upper = (milliseconds(value) for value in astuple(self.milliseconds))
        return (
            f"### {self.heading}\n**{median} ms** an image ({lower} to {upper})\n\n"
            f"**{file_size(self.size)}** {self.stored}"
        )


@dataclass(frozen=True)
class Comparison:
    """Both sides, and what is to be said about them."""

    dense: Column
    pruned: Column
    remarks: str


def open_image(path: Path) -> Image.Image:
    """Read an image of any format as RGB, rotated as its EXIF orientation says.

    Raises:
        CorruptImageError: it cannot be read; the message names the file and the reason.
    """
    return RGB_IMAGE.decode_example({"path": path.name, "bytes": path.read_bytes()})


def compare(models: Models, subnetwork: Subnetwork, image: Image.Image, with_prompt: bool) -> Comparison:
    """Classify an image by a subnetwork and by the dense model.

    Where there is no dense model the subnetwork itself stands for it, its zeros stored and multiplied; the remarks
    say so.

    Args:
        models: all models.
        subnetwork: one of them.
        image: an image in RGB.
        with_prompt: whether the subnetwork adds its visual prompt.
    """
    pixels = preprocess(models, image)
    dense = models.dense
    run_dense: Callable[[], Any] = (
        (lambda: dense.model(pixels)) if dense else (lambda: subnetwork.model(pixels, use_prompt=with_prompt))
    )
    actions = {"dense": run_dense, "pruned": lambda: subnetwork.fast(pixels, use_prompt=with_prompt)}
    with torch.inference_mode():
        seconds = time_in_turns(actions, _ROUNDS)
        outputs = {name: action().logits[0].softmax(-1).tolist() for name, action in actions.items()}
    labels = subnetwork.model.config.id2label.values()
    times = {name: Spread.of([1000 * value for value in values]) for name, values in seconds.items()}
    predictions = {name: dict(zip(labels, output, strict=True)) for name, output in outputs.items()}
    prompted = ", with prompt" if with_prompt else ""
    if dense:
        heading, size, stored = f"Dense: {dense.name}", dense.file_bytes, "on disk"
    else:
        heading, stored = f"Pruned, on dense kernels{prompted}", "with every zero stored"
        size = subnetwork.model.sparsity_report().dense_bytes
    return Comparison(
        Column(heading, predictions["dense"], times["dense"], size, stored),
        Column(
            f"Pruned: {subnetwork.name}{prompted}",
            predictions["pruned"],
            times["pruned"],
            subnetwork.file_bytes,
            "on disk, packed",
        ),
        remarks_on(models, subnetwork),
    )


def remarks_on(models: Models, subnetwork: Subnetwork) -> str:
    """Say what stands on both sides, on which kernels, and how it was timed."""
    report, threads = subnetwork.fast.report, torch.get_num_threads()
    layers, sparse = len(report.layers), sum(layer.kernel != DENSE for layer in report.layers)
    same = (
        "There is no dense model here: on the left is the same subnetwork, zeros stored and multiplied, so only time "
        "and bytes differ, and predictions cannot. "
    )
    kernels = (
        f"On the right, {sparse} of {layers} layers run on sparse kernels: those that are faster so here."
        if sparse and not report.kept_dense
        else "On this machine sparse kernels make this subnetwork no faster: both sides run on dense ones."
    )
    return (
        f"{'' if models.dense else same}{kernels} Times are medians and quartiles of {_ROUNDS} runs of the models "
        f"alone, in turns, measured now on this machine with {threads} thread{'s' * (threads > 1)}."
    )


def preprocess(models: Models, image: Image.Image) -> Tensor:
    """Turn an image in RGB into normalised pixels [1, channels, height, width]."""
    return models.image_processor(images=image, return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def seen_picture(model: PromptedSparseModel, pixels: Tensor, with_prompt: bool) -> Image.Image:
    """Show the pixels that the model sees, with the prompt or without.

    Args:
        model: the model.
        pixels: one normalised image, [1, channels, height, width].
        with_prompt: whether the prompt is added.
    """
    seen = model.prompt(pixels) if with_prompt and model.prompt is not None else pixels
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in model.config.geometry[1:])
    return _picture(seen[0] * std + mean)


@torch.inference_mode()
def prompt_picture(model: PromptedSparseModel) -> Image.Image | None:
    """Show the prompt around mid-grey, which stands for no change, at full contrast; None where there is none."""
    if model.prompt is None:
        return None
    delta = model.prompt.delta()
    return _picture((delta / (delta.abs().max().item() or 1) + 1) / 2)


@torch.inference_mode()
def prompt_caption(model: PromptedSparseModel) -> str:
    """Say how much the prompt changes a pixel at most: its picture, at full contrast, does not."""
    if model.prompt is None:
        return "No visual prompt"
    return f"Prompt, up to ±{255 * model.prompt.delta().abs().max().item():.3g}/255"


def _picture(pixels: Tensor) -> Image.Image:
    """Enlarge pixels [1 or 3, height, width] in [0, 1] without smoothing."""
    values = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).expand(3, -1, -1)
    picture = Image.fromarray(values.permute(1, 2, 0).numpy())
    scale = max(1, _PICTURE_SIDE // min(picture.size))
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def kept_figure(subnetwork: Subnetwork) -> Figure:
    """Plot the share of weights kept in each layer, narrow enough for a telephone and so without a title."""
    figure = density_figure(subnetwork.model.sparsity_report())
    figure.suptitle("")
    figure.set_size_inches(_FIGURE_WIDTH, figure.get_figheight())
    return figure


def sparsity_label(models: Models, subnetwork: Subnetwork) -> str:
    """Name the sparsity of a subnetwork and those that there are."""
    there = ", ".join(_percent(each) for each in models.subnetworks)
    return f"Sparsity: {_percent(subnetwork)} (there are {there})"


def _percent(subnetwork: Subnetwork) -> str:
    return f"{100 * subnetwork.model.sparsity:.4g}%"
