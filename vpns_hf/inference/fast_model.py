"""`FastModel`: a pruned model whose layers run on the kernels that were measured to be the fastest."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..values import instance_of, require
from .attention import project_attention
from .batchnorm import fold_batchnorms
from .kernels import DENSE, checked_kernels, replacements
from .layers import density
from .measuring import Measure, median_milliseconds
from .report import InferenceReport, LayerChoice

if TYPE_CHECKING:
    from ..model.configuration import PromptedSparseConfig
    from ..model.modeling import PromptedSparseModel

logger = logging.getLogger(__name__)

# Largest difference of logits, as a share of the largest logit, between the model and what was made of it.
_TOLERANCE = 1e-4


class FastModel(nn.Module):
    """A pruned image classifier for inference, made by [`PromptedSparseModel.for_inference`].

    It can be copied, pickled and called with batches of any size. Its tensors are those of its layers: sparse ones
    hold the kept values and their indices. It is not trained.

    Args:
        model: a copy of the model, in the dense state, with other layers in its place.
        report: which kernel each layer runs on, and the measured times.
    """

    def __init__(self, model: PromptedSparseModel, report: InferenceReport):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.report = report
        self.training = False

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, use_prompt: bool | None = None) -> ImageClassifierOutput:
        """Classify normalised images [n, channels, height, width], float32; see [`PromptedSparseModel.forward`]."""
        return self.model(pixel_values, use_prompt=use_prompt)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError("A model for inference cannot be trained; train the model that it was made of.")
        return super().train(mode)

    # What transformers' pipelines read.

    @property
    def config(self) -> PromptedSparseConfig:
        """Configuration of the model, with its labels."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Return the device: the CPU."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of images and logits: float32."""
        return torch.float32

    def can_generate(self) -> bool:
        """Return False: the model generates no text."""
        return False


@torch.no_grad()
def build_fast_model(
    model: PromptedSparseModel,
    example: Tensor,
    kernels: Sequence[str] | None = None,
    measure: Measure = median_milliseconds,
) -> FastModel:
    """Make a copy of a pruned model ready for inference; arguments and errors as of
    [`PromptedSparseModel.for_inference`].
    """
    names = checked_kernels(kernels)
    _check(model, example)
    dense = _plain_copy(model)
    expected = dense(example).logits
    fast = _folded(dense, example, expected)
    choices = _choose_kernels(fast, example, names, measure)
    milliseconds = measure({DENSE: lambda: dense(example), "fast": lambda: fast(example)})
    kept_dense = None
    if not _is_close(fast(example).logits, expected):
        kept_dense = "the logits with sparse kernels differ from those of the model"
        logger.warning("No layer of this %s is made sparse: %s.", type(model.backbone).__name__, kept_dense)
    elif milliseconds["fast"] >= milliseconds[DENSE]:
        kept_dense = "the whole model was not faster with sparse kernels"
    report = InferenceReport(choices, milliseconds, kept_dense, tuple(example.shape), torch.get_num_threads())
    return FastModel(dense if kept_dense else fast, report)


def _check(model: PromptedSparseModel, example: Tensor) -> None:
    if model.config.state != "frozen":
        raise ValueError(
            f"Only frozen masks can be made fast; the model is in the {model.config.state!r} state. Call "
            "`freeze_masks()` first."
        )
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise ValueError(
            f"Sparse kernels compute in float32 on the CPU, and this model is {model.dtype} on {model.device}; call "
            "`model.float().cpu()` first."
        )
    require("example", example, instance_of(Tensor))
    if example.dim() != 4 or example.dtype != torch.float32 or example.device.type != "cpu":
        raise ValueError(
            f"`example` is {example.dtype} of shape {tuple(example.shape)} on {example.device}; expected images as "
            "they are served: float32 [n, channels, height, width] on the CPU."
        )


def _plain_copy(model: PromptedSparseModel) -> PromptedSparseModel:
    """Copy the model in the dense state with the zeros written in, in evaluation mode."""
    plain = copy.deepcopy(model)
    plain.merge_and_unload()
    plain.config.state = "dense"
    return plain.requires_grad_(False).eval()


def _sharing_copy(model: PromptedSparseModel) -> PromptedSparseModel:
    """Copy the modules and share the tensors."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _folded(dense: PromptedSparseModel, example: Tensor, expected: Tensor) -> PromptedSparseModel:
    """Copy with projections of attention as linear layers and, where logits stay, without BatchNorms."""
    fast = _sharing_copy(dense)
    project_attention(fast.backbone)
    folded = _sharing_copy(fast)
    fold_batchnorms(folded, example)
    return folded if _is_close(folded(example).logits, expected) else fast


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    return bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _choose_kernels(
    model: PromptedSparseModel, example: Tensor, kernels: Sequence[str], measure: Measure
) -> tuple[LayerChoice, ...]:
    """Replace each layer by the fastest that computes the same, measured on its input in a run of the model."""
    chosen: dict[str, tuple[LayerChoice, nn.Module]] = {}

    def choose(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        if name in chosen:
            return
        candidates: dict[str, nn.Module] = {DENSE: layer, **replacements(layer, kernels)}
        times: dict[str, float] = {}
        if len(candidates) > 1:
            # `layer(x)` would call this hook again.
            times = measure({key: _call(candidate, x) for key, candidate in candidates.items()})
        kernel = min(times, key=times.__getitem__, default=DENSE)
        weight = layer.get_parameter("weight")
        choice = LayerChoice(name, tuple(weight.shape), density(weight), kernel, times)
        chosen[name] = choice, candidates[kernel]

    handles = []
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hook = lambda layer, args, name=name: choose(name, layer, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    model(example)
    for handle in handles:
        handle.remove()
    # A layer whose weight is read without calling it has no input to measure, and stays.
    for name, (_, replacement) in chosen.items():
        model.backbone.set_submodule(name, replacement)
    return tuple(choice for choice, _ in chosen.values())


def _call(layer: nn.Module, x: Tensor) -> Any:
    return lambda: layer.forward(x)
