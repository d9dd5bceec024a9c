"""Check the settings and the model that `from_backbone` is given, before any work starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..masking.channels import CHANNELS, UNITS
from ..masking.patterns import get_pattern
from ..values import FLAG, FRACTION, PATH, Check, count, either, instance_of, is_number, optional
from .configuration_checks import FIELDS, LABEL_COUNT
from .tensor_shapes import build_backbone

if TYPE_CHECKING:
    from .modeling import PromptedSparseModel

logger = logging.getLogger(__name__)


def _is_processor(value: Any) -> bool:
    # Looked up only where there is one: the class loads torchvision.
    return value is None or isinstance(value, transformers.BaseImageProcessor)


BUDGET = "'channels', 'parameters' or 'macs', alone or with a share to remove, such as 'macs:0.5'"
_SIDES = either(count(1, 2**14), FIELDS["image_size"])
SETTINGS: dict[str, Check] = {
    "backbone": Check("a Hub id, a local folder or a model object", either(PATH, instance_of(nn.Module)).accepts),
    "sparsity": optional(FRACTION),
    **{name: FIELDS[name] for name in ("scope", "prompt", "prompt_size", "label_mapping", "keep_source_head")},
    **{name: FIELDS[name] for name in ("ignore_modules", "image_mean", "image_std", "channel_multiple")},
    "budget": optional(Check(BUDGET, lambda value: isinstance(value, str))),
    "new_head": optional(FLAG),
    "num_labels": optional(LABEL_COUNT),
    "prompt_inner_size": _SIDES,
    "image_size": _SIDES,
    "image_processor": Check("None or an image processor", _is_processor),
}
"""Checks of the arguments of [`PromptedSparseModel.from_backbone`]."""


def check_settings(label_mapping: str | None, new_head: bool | None, labels: Mapping[int, str] | None) -> None:
    """Refuse settings of [`PromptedSparseModel.from_backbone`] that do not fit together.

    Raises:
        ValueError: a label mapping has a new head or no labels.
    """
    if label_mapping is not None and (new_head or labels is None):
        raise ValueError(
            "A label mapping keeps the pretrained head: pass `num_labels` or `id2label` of the task, and no "
            "`new_head`."
        )


def split_budget(budget: str | None, sparsity: float | None) -> tuple[str, float | None]:
    """Return the unit of a budget and the sparsity in that unit.

    Args:
        budget: a unit of [`UNITS`], with `":share"` where that is the sparsity; None: channels.
        sparsity: sparsity that is passed beside it, if any.

    Raises:
        ValueError: there is no such budget, or both give a share.
    """
    unit, colon, share = (CHANNELS if budget is None else budget).partition(":")
    try:
        wanted = float(share) if colon else sparsity
    except ValueError:
        wanted = math.nan
    if unit not in UNITS or (colon and not is_number(wanted, 0, 1)):
        raise ValueError(f"`budget` is {budget!r}; expected {BUDGET}.")
    if colon and sparsity is not None and sparsity != wanted:
        raise ValueError(f"`budget` is {budget!r} and `sparsity` {sparsity}; pass the share to remove once.")
    return unit, wanted


def final_sparsity(sparsity: float | None, scope: str, pattern: str) -> float:
    """Return the sparsity to prune to: as given, else that of the pattern, else 0.9.

    Raises:
        ValueError: an unknown pattern, or one that does not take this sparsity or scope.
    """
    grouping = get_pattern(pattern)
    final = grouping.final_sparsity(sparsity)
    grouping.check(final, scope)
    return final


def check_wrapped(model: PromptedSparseModel) -> None:
    """Refuse a model without prunable weights, or whose backbone does not accept images of its size.

    Raises:
        ValueError: what is wrong, in one sentence.
    """
    check_prunable(model)
    check_image_size(model)


def check_prunable(model: PromptedSparseModel) -> None:
    """Refuse a model without prunable weights, and warn of weights that stay dense because of the pattern.

    Raises:
        ValueError: there is none.
    """
    if not model.prunables():
        raise ValueError(
            f"{type(model.backbone).__name__} has no prunable weight: no linear or convolution layer outside "
            f"`ignore_modules` and a new head that takes the pattern {model.pattern.name!r}."
        )
    if dense := model.unpatterned_weights():
        logger.warning(
            "%d weights stay dense, because they do not take the pattern %s, and do not count in the sparsity: %s",
            len(dense),
            model.pattern.name,
            ", ".join(dense),
        )


def check_image_size(model: PromptedSparseModel) -> None:
    """Run one black image of the configured size through the model.

    Raises:
        ValueError: the backbone does not accept it.
    """
    if model.config.image_size is None:
        return
    channels = image_channels(model)
    image = torch.zeros(1, channels, *model.config.image_size, device=model.device, dtype=model.dtype)
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval().head_logits(image)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{type(model.backbone).__name__} does not accept images of {tuple(model.config.image_size)} (height, "
            f"width) with {channels} channels: {error}"
        ) from error
    model.train(training)
    _check_class_count(model.backbone, model.config.backbone_config, logits)


def _check_class_count(model: PreTrainedModel, config: PreTrainedConfig, logits: Tensor) -> None:
    if logits.shape[-1] != config.num_labels:
        raise ValueError(
            f"{type(model).__name__} gives {logits.shape[-1]} logits, but its configuration counts "
            f"{config.num_labels} labels; set `model.config.num_labels` to the number of classes of the head."
        )


def check_handed_over(model: PreTrainedModel, config: PreTrainedConfig, image_size: Sequence[int] | None) -> None:
    """Refuse a model object that its configuration does not rebuild, so that a saved model could not be loaded.

    The model and one that is built from the configuration, with the same weights, must give the same logits for a
    random image. Shapes of layers that were cut before are recorded in `model.config.tensor_shapes`.

    Args:
        model: image classifier.
        config: copy of its configuration.
        image_size: (height, width) of that image; None: 224 pixels each.

    Raises:
        ValueError: the model was changed after it was built in a way that its configuration does not state, or
            parameters of it were frozen.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        return
    image = _random_image(model, image_size or (224, 224))
    expected = _logits(model, image)
    _check_class_count(model, config, expected)
    shapes, built = _shapes(model), _shapes(rebuilt := _built(config))
    if changed := sorted(set(shapes) ^ set(built)):
        raise ValueError(
            f"{len(changed)} tensors of this {type(model).__name__} differ from those that its configuration builds, "
            f"such as {changed[0]}, so it could not be loaded again after saving. Undo what changed it: merge "
            "adapters, remove parametrizations (`torch.nn.utils.parametrize.remove_parametrizations`, "
            "`torch.nn.utils.prune.remove`), and keep a head of the original form."
        )
    _check_trainable(model, rebuilt)
    if cut := {name: shape for name, shape in shapes.items() if built[name] != shape}:
        cut = (config.to_dict().get("tensor_shapes") or {}) | cut
        model.config.update({"tensor_shapes": cut})
        config.update({"tensor_shapes": cut})
        rebuilt = _built(config)
    rebuilt.to(model.device, model.dtype)
    rebuilt.load_state_dict(model.state_dict())
    found = _logits(rebuilt, image)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), equal_nan=True):
        raise ValueError(
            f"This {type(model).__name__} gives other logits than one that its configuration builds with the same "
            f"weights (largest difference {float((found - expected).abs().max()):.2g}), so it would change by saving. "
            "State in the configuration what was changed after building, such as activations or pooling, or undo it."
        )


def _check_trainable(model: PreTrainedModel, rebuilt: PreTrainedModel) -> None:
    """Refuse layers that were frozen by hand.

    Some classes freeze position embeddings themselves, and a whole model without gradients was put aside for
    inference.
    """
    own = {name for name, parameter in rebuilt.named_parameters() if not parameter.requires_grad}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    by_hand = sorted(name for name, is_trained in trained.items() if not is_trained and name not in own)
    if by_hand and any(trained.values()):
        raise ValueError(
            f"{len(by_hand)} parameters of this {type(model).__name__} do not require gradients, such as "
            f"{by_hand[0]}, but a pruning method trains the whole backbone in its stages; call "
            "`model.requires_grad_(True)` first. `ignore_modules=[...]` leaves layers unpruned."
        )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    # The global random state stays as it is, so that seeded runs do not depend on the check.
    with torch.random.fork_rng(devices=[]):
        return build_backbone(config)


def _random_image(model: PreTrainedModel, image_size: Sequence[int]) -> Tensor:
    image = torch.randn(1, image_channels(model), *image_size, generator=torch.Generator().manual_seed(0))
    return image.to(model.device, model.dtype)


def image_channels(model: nn.Module) -> int:
    """Return the channels of the images that the first convolution takes."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return next((module.in_channels for module in convolutions), 3)


@torch.no_grad()
def _logits(model: PreTrainedModel, image: Tensor) -> Tensor:
    try:
        with evaluating(model):
            return model(pixel_values=image).logits.float()
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{type(model).__name__} fails on an image of the size of its configuration, {tuple(image.shape[1:])} "
            f"(channels, height, width): {error}"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and every module back to its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
