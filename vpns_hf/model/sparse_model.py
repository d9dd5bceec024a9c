"""`SparseModel`: an image classifier with masks over its weights, in one of three states."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from .. import masking
from ..masking import sharding
from ..masking.frozen import mask_gradients
from ..masking.prunable import MASK_SUFFIX, PrunableWeight, parametrizations, stored_weight
from ..masking.search import MaskedWeight
from .backbones import position_kwargs
from .configuration import PromptedSparseConfig
from .sparsity import SparsityReport, measure_sparsity

logger = logging.getLogger(__name__)
ROLES = ("scores", "prompt", "head", "weights")


class SparseModel(PreTrainedModel):
    """Base of [`PromptedSparseModel`]: the masks and scores of its backbone, and the role of each of its parameters.

    Args:
        config: see [`PromptedSparseConfig`]; the model is built in its `state`.
        backbone: the image classifier to wrap; built from `config.backbone_config` when None.
    """

    image_processor: BaseImageProcessor | None = None
    config: PromptedSparseConfig
    backbone: PreTrainedModel

    def __init__(self, config: PromptedSparseConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = backbone or AutoModelForImageClassification.from_config(
            config.backbone_config, trust_remote_code=False
        )
        self._backbone_kwargs = position_kwargs(self.backbone, config.image_size)
        self._collapsed = set[str]()
        if config.state == "search":
            masking.attach_scores(self.slots(), config.signed_scores)
        elif config.state == "frozen":
            slots = self.slots()
            masking.freeze(slots, masking.all_kept(slots))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Hooks on parameters are lost when a model is copied.
        super().__setstate__(state)
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        if self.config.state == "frozen":
            masking.mask_gradients(self.slots())

    # Parameters by role ----------------------------------------------------------------------------------------------

    def slots(self) -> dict[str, masking.PrunableWeight]:
        """Where the prunable weights live, by backbone parameter name."""
        skip = self.config.head_parameters if self.config.new_head else ()
        return masking.find_prunable_weights(self.backbone, self.config.ignore_modules, skip)

    def prunable_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that store the prunable weights, by backbone parameter name, in any state."""
        return {name: cast(nn.Parameter, masking.stored_weight(slot)) for name, slot in self.slots().items()}

    def parameters_by_role(self) -> dict[str, dict[str, nn.Parameter]]:
        """Every parameter under its role: `scores`, `prompt`, `head` (a new head only) or `weights`."""
        new_head = {f"backbone.{name}" for name in self.config.head_parameters} if self.config.new_head else set()
        roles: dict[str, dict[str, nn.Parameter]] = {role: {} for role in ROLES}
        for name, parameter in self.named_parameters():
            if name.startswith("prompt."):
                roles["prompt"][name] = parameter
            elif name.endswith(".scores"):
                roles["scores"][name] = parameter
            else:
                roles["head" if name in new_head else "weights"][name] = parameter
        return roles

    def train_only(self, *roles: str) -> None:
        """Set `requires_grad` for the parameters of these roles and clear it for all others."""
        for role, parameters in self.parameters_by_role().items():
            for parameter in parameters.values():
                parameter.requires_grad_(role in roles)

    # Masks -----------------------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, Tensor]:
        """The score parameters by backbone parameter name; empty outside the search state."""
        if self.config.state != "search":
            return {}
        return {name: part.scores for name, part in masking.masked_weights(self.slots()).items()}

    def masks(self) -> dict[str, Tensor]:
        """The masks by backbone parameter name, True = kept; all True in the dense state."""
        slots = self.slots()
        if self.config.state == "search":
            return {name: part.mask for name, part in masking.masked_weights(slots).items()}
        if self.config.state == "frozen":
            return masking.frozen_masks(slots)
        return masking.all_kept(slots)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are masked, measured."""
        masks = self.masks().values()
        return 1 - sharding.count_true(masks) / sum(mask.numel() for mask in masks)

    def set_sparsity(self, sparsity: float) -> None:
        """Change the sparsity and select the masks anew; search state only."""
        self._require("search", "change the sparsity")
        masking.kept_count(0, sparsity)
        self.config.sparsity = sparsity
        self.update_masks()
        self._warn_of_collapse()

    def update_masks(self) -> int:
        """Select the masks from the scores and return how many entries changed; search state only."""
        self._require("search", "update masks")
        return masking.update_masks(self.slots(), self.config.sparsity, self.config.scope)

    def set_implicit_gradient(self, weight: float) -> None:
        """Add BiP's implicit gradient to that of the scores (arXiv 2210.04092); search state only.

        It is quadratic in the gradient: with gradient accumulation and on several processes it is that of each
        micro-batch, summed.

        Args:
            weight: its factor 1 / gamma; 0 leaves it out.
        """
        self._require("search", "set the implicit gradient")
        for part in masking.masked_weights(self.slots()).values():
            part.implicit_gradient = weight

    def _warn_of_collapse(self) -> None:
        """Warn of layers that keep no weight, of each of them once."""
        empty = {name for name, mask in self.masks().items() if not mask.any()}
        if new := sorted(empty - self._collapsed):
            logger.warning(
                "Layer collapse at %.2f%% sparsity: no weight is left in %s. Lower the sparsity, or keep some in "
                'every layer with `scope="layer"` or `"erk"`.',
                100 * self.sparsity,
                ", ".join(new),
            )
        self._collapsed = empty

    def sparsity_report(self) -> SparsityReport:
        """Kept and total weights, bytes and multiply-accumulates of every prunable layer."""
        return measure_sparsity(
            self.backbone, self.slots(), self.masks(), self.config.image_size, self._backbone_kwargs
        )

    # From state to state ---------------------------------------------------------------------------------------------

    def attach_scores(self, signed: bool = False) -> None:
        """Dense to search: give every prunable weight scores and a mask; scores and prompt become trainable.

        Args:
            signed: rank the scores themselves and start them at zero (movement pruning), instead of their absolute
                values, which start in proportion to the weights (HYDRA, VPNs).
        """
        self._require("dense", "attach scores")
        self.unshard()
        masking.attach_scores(self.slots(), signed)
        self.config.state, self.config.signed_scores = "search", signed
        self.train_only("scores", "prompt", "head")
        self.update_masks()
        self._warn_of_collapse()

    def detach_scores(self) -> None:
        """Search to dense: drop scores and masks; all parameters become trainable."""
        self._require("search", "detach scores")
        self.unshard()
        masking.detach_scores(self.slots())
        self.config.state, self.config.signed_scores = "dense", False
        self.train_only(*ROLES)

    def freeze_masks(self) -> None:
        """Search to frozen: write the zeros into the weights, drop the scores; all parameters become trainable.

        From here on pruned weights get no gradient, so they stay exactly zero in any training loop whose optimizer is
        made after this call.
        """
        self._require("search", "freeze masks")
        self.apply_masks(self.masks())

    def apply_masks(self, masks: Mapping[str, Tensor]) -> int:
        """Freeze the model with masks found elsewhere, or replace masks that are frozen already.

        Args:
            masks: bool tensors by backbone parameter name, True = kept; one for each prunable weight.

        Returns:
            How many entries changed. Weights that were pruned before come back as zeros.

        Raises:
            ValueError: names or shapes differ from those of `masks()`.
        """
        slots = self.slots()
        masking.check_masks(masks, slots)
        own = self.masks()
        masks = {name: sharding.arranged_like(mask.detach().clone().bool(), own[name]) for name, mask in masks.items()}
        if self.config.state == "frozen":
            flips = masking.change_frozen_masks(slots, masks)
        else:
            flips = sharding.count_true(mask ^ masks[name].to(mask.device) for name, mask in own.items())
            masks = {name: sharding.whole(mask) for name, mask in masks.items()}
            self.unshard()
            if self.config.state == "search":
                self.detach_scores()
            masking.freeze(self.slots(), masks)
            self.config.state = "frozen"
            self.train_only(*ROLES)
            self._mask_gradients()
        self.config.sparsity = self.sparsity
        self._warn_of_collapse()
        return flips

    def merge_and_unload(self) -> PreTrainedModel:
        """The plain backbone with the zeros written in; this wrapper must not be used afterwards.

        With `keep_source_head` or a `"bayesian"` label mapping the plain model still has all source classes.
        """
        self.unshard()
        if self.config.state == "search":
            self.freeze_masks()
        if self.config.state == "frozen":
            masking.unfreeze(self.slots())
        return self.backbone

    def _require(self, state: str, action: str) -> None:
        if self.config.state != state:
            raise ValueError(
                f"Cannot {action}: the model is in the {self.config.state!r} state, and this needs {state!r}."
            )

    # Weights ---------------------------------------------------------------------------------------------------------

    def backbone_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the dense backbone by its name there, in any state; not copied.

        Scores and masks are left out; in the frozen state pruned weights are zero.
        """
        return masking.dense_state(self.backbone)

    @torch.no_grad()
    def rewind(self, state: Mapping[str, Tensor]) -> None:
        """Set the backbone back to values that [`~PromptedSparseModel.backbone_state`] gave; masks and scores stay.

        Raises:
            ValueError: the names differ from those of this backbone.
        """
        own = self.backbone_state()
        if unknown := sorted(set(state) ^ set(own)):
            raise ValueError(f"The saved state is of another backbone: {len(unknown)} names differ, as {unknown[0]}.")
        if wrong := [name for name in own if own[name].shape != state[name].shape]:
            raise ValueError(f"The saved state is of another backbone: {len(wrong)} shapes differ, as of {wrong[0]}.")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        if self.config.state == "frozen":
            self.zero_masked_weights()

    def zero_masked_weights(self) -> None:
        """Write the zeros again; for training loops that replace or overwrite parameters. Frozen state only."""
        self._require("frozen", "write zeros")
        masking.zero_masked_weights(self.slots())

    # Other models in its place ---------------------------------------------------------------------------------------

    def replace_with(self, other: SparseModel) -> None:
        """Take over another model's weights, state and configuration, so that references to this one stay good."""
        self.__setstate__(other.__dict__)

    def _rebuilt(self, config: PromptedSparseConfig) -> Self:
        """A model of that configuration that is trained as this one is; its weights are still to be loaded."""
        trainable = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        with torch.device(self.device):
            # torch makes the class of a sharded module build the plain one.
            model = type(self)(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        model.image_processor = self.image_processor
        return model.train(self.training)

    # Sharded by FSDP2 ------------------------------------------------------------------------------------------------

    def shard_masks(self) -> None:
        """Split the masks as `torch.distributed.fsdp.fully_shard(model)` has split the weights; call it right after.

        From then on masks are selected without gathering the scores, and pruned weights get no gradient. Nothing
        happens where nothing is sharded.
        """
        if self.config.state != "dense" and sharding.is_sharded(self.parameters()):
            _shard_masks(self.slots(), self.config.state)

    def unshard(self) -> None:
        """Undo `fully_shard`: every process holds the whole model again; all of them call this together.

        What changes the state of the model or the shape of its head does this by itself, because `fully_shard` cannot
        follow. Nothing happens where nothing is sharded.
        """
        if not sharding.is_sharded(self.parameters()):
            return
        whole = self._rebuilt(copy.deepcopy(self.config))
        whole.load_state_dict(sharding.full_state(self, on_every_process=True), assign=True)
        sharding.forget(self)
        self.__class__ = type(whole)
        self.replace_with(whole)


def _shard_masks(slots: Mapping[str, PrunableWeight], state: str) -> None:
    """Split the masks as `fully_shard` has split the weights; in the frozen state, mask the gradients of the parts.

    Args:
        state: `"search"` or `"frozen"`.
    """
    for slot in slots.values():
        weight = stored_weight(slot)
        if state == "search":
            masked_weight = cast(MaskedWeight, parametrizations(slot)[0])
            masked_weight.mask = sharding.split_like(masked_weight.mask, weight)
        else:
            name = slot.tensor_name + MASK_SUFFIX
            setattr(slot.module, name, sharding.split_like(slot.module.get_buffer(name), weight))
    if state == "frozen":
        mask_gradients(slots)
