"""Plot a learned prompt and prompted images."""

from __future__ import annotations

import copy
import os

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ..model.modeling import PromptedSparseModel
from ..model.prompts import VisualPrompt
from .style import save_figure


def plot_prompt(
    model: PromptedSparseModel, image: Tensor, path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Save [`prompt_figure`] as a PNG, with the same arguments and errors.

    Folders of `path` are created, and an older file is replaced.
    """
    save_figure(prompt_figure(model, image, title), path)


@torch.no_grad()
def prompt_figure(model: PromptedSparseModel, image: Tensor, title: str | None = None) -> Figure:
    """Plot an image, the prompt that is added to it, and the prompted image.

    The image is shown as the prompt places it. The prompt is shown around mid-grey, which stands for no change:
    brighter and darker than that, in every colour channel, is what it adds and takes away.

    Args:
        model: a model with a prompt.
        image: one normalised image, [channels, height, width] with one or three channels.
        title: replaces the default title.

    Raises:
        ValueError: there is no prompt, or the image does not fit it.
    """
    # A copy in evaluation mode, so that a prompt that draws its place shows the same one in every panel.
    prompt = copy.deepcopy(_prompt_of(model, image)).eval()
    delta = prompt.delta().float()
    image = image.to(delta.device).float()
    placed = prompt.place(_pixels(prompt, image)[None])[0]
    prompted = _pixels(prompt, prompt(image[None])[0])
    height, width = prompt.image_size
    figure = Figure(figsize=(12, 1.6 + 3.8 * height / width), layout="constrained")
    panels = figure.subplots(1, 3, gridspec_kw={"wspace": 0.05})
    _show(panels[0], placed, _image_caption(prompt))
    _show_delta(figure, panels[1], 255 * delta)
    _show(panels[2], prompted, "image + prompt, cut off at black and white:\nwhat the model sees")
    figure.suptitle(title or "The learned visual prompt on one image")
    return figure


def _prompt_of(model: PromptedSparseModel, image: Tensor) -> VisualPrompt:
    prompt = model.prompt
    if prompt is None:
        raise ValueError('This model has no prompt to show; build it with `prompt="pad"`.')
    channels = len(prompt.mean)
    if channels not in (1, 3):
        raise ValueError(f"Images of one or three channels can be shown; this model's have {channels}.")
    if tuple(image.shape) != (expected := (channels, *prompt.image_size)):
        raise ValueError(f"`image` has shape {tuple(image.shape)}; expected {expected}: channels, height, width.")
    return prompt


def _pixels(prompt: VisualPrompt, image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=image.device).view(-1, 1, 1) for values in (prompt.mean, prompt.std))
    return (image * std + mean).clamp(0, 1)


def _image_caption(prompt: VisualPrompt) -> str:
    if prompt.inner_size == prompt.image_size:
        return "image"
    height, width = prompt.inner_size
    return f"image, shrunk to {width} x {height} pixels\nand centred on black"


def _show(panel: Axes, pixels: Tensor, caption: str) -> None:
    """Show [1 or 3, h, w] values in [0, 1], pixel by pixel."""
    panel.imshow(pixels.cpu().expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
    panel.set_title(caption, fontsize=11)
    panel.set(xticks=[], yticks=[])


def _show_delta(figure: Figure, panel: Axes, delta: Tensor) -> None:
    """Show [1 or 3, h, w] changes in units of 1/255 around mid-grey, with a colour bar below."""
    largest = delta.abs().max().item()
    bound = largest or 1
    caption = f"learned prompt, largest change {largest:.3g}/255\n(mid-grey: no change)"
    _show(panel, (delta / bound + 1) / 2, caption)
    strip = panel.inset_axes((0.0, -0.09, 1.0, 0.045))
    bar = figure.colorbar(ScalarMappable(Normalize(-bound, bound), "gray"), cax=strip, orientation="horizontal")
    bar.locator = MaxNLocator(5, symmetric=True)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:+.3g}" if value else "0")
    bar.set_label(("added to each colour channel" if delta.shape[0] == 3 else "added to each pixel") + ", in 1/255")
