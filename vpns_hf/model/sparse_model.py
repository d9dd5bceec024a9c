"""`SparseModel`: an image classifier with masks over its weights, in one of three states."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import masking
from ..masking import sharding
from ..masking.prunable import stored_weight
from ..values import FLAG, FRACTION, NUMBER, checked, one_of, require
from .backbones import position_kwargs
from .channel_groups import build_pattern
from .channel_removal import remove_channels
from .configuration import PromptedSparseConfig
from .labels import share_labels
from .sparsity import SparsityReport, measure_sparsity
from .tensor_shapes import build_backbone

logger = logging.getLogger(__name__)
ROLES = ("scores", "prompt", "head", "weights")
# Trained while masks are learned, outside a trainer.
SEARCH_ROLES = ("scores", "prompt", "head")
_ROLE = one_of(ROLES)


class SparseModel(PreTrainedModel):
    """Base of [`PromptedSparseModel`]: the masks and scores of its backbone, and the role of each of its parameters.

    Args:
        config: see [`PromptedSparseConfig`]; the model is built in its `state`.
        backbone: the image classifier to wrap; built from `config.backbone_config` when None.
    """

    # A BaseImageProcessor: transformers evaluates these annotations at import, and its name would load torchvision.
    image_processor: Any = None
    config: PromptedSparseConfig
    backbone: PreTrainedModel

    def __init__(self, config: PromptedSparseConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.backbone = backbone or build_backbone(config.backbone_config)
        self.pattern = build_pattern(config, self.backbone)
        self._backbone_kwargs = position_kwargs(self.backbone, config.image_size)
        self._collapsed = set[str]()
        if config.state == "search":
            masking.attach_scores(self.prunables(), config.signed_scores, self.pattern)
        elif config.state == "frozen":
            prunables = self.prunables()
            masking.freeze(prunables, masking.all_kept(prunables))
        masking.guard_states(self.backbone)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Hooks on parameters are lost when a model is copied.
        super().__setstate__(state)
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        if self.config.state == "frozen":
            masking.mask_gradients(self.prunables())

    def prunables(self) -> dict[str, masking.PrunableWeight]:
        """Find the prunable weights, by backbone parameter name: those that take the pattern."""
        fits = self.pattern.fits
        return {name: weight for name, weight in self._maskable().items() if fits(name, stored_weight(weight).shape)}

    def unpatterned_weights(self) -> list[str]:
        """Return the weights that stay dense because they do not take the pattern."""
        fits = self.pattern.fits
        return [name for name, weight in self._maskable().items() if not fits(name, stored_weight(weight).shape)]

    def _scored(self) -> dict[str, masking.PrunableWeight]:
        return masking.scored(self.prunables(), self.pattern)

    def _maskable(self) -> dict[str, masking.PrunableWeight]:
        skip = self.config.head_parameters if self.config.new_head else ()
        return masking.find_prunable_weights(self.backbone, self.config.ignore_modules, skip)

    def prunable_weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that store the prunable weights, by backbone parameter name, in any state."""
        return {
            name: cast(nn.Parameter, masking.stored_weight(prunable)) for name, prunable in self.prunables().items()
        }

    def parameters_by_role(self) -> dict[str, dict[str, nn.Parameter]]:
        """Group the parameters by role: `scores`, `prompt`, `head` (a new head only) or `weights`."""
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
        """Set `requires_grad` for the parameters of these roles and clear it for all others.

        Args:
            roles: names out of `scores`, `prompt`, `head` and `weights`.

        Raises:
            ValueError: there is no such role.
        """
        for role in roles:
            require("roles", role, _ROLE)
        for role, parameters in self.parameters_by_role().items():
            for parameter in parameters.values():
                parameter.requires_grad_(role in roles)

    def scores(self) -> dict[str, Tensor]:
        """Return the score parameters by backbone parameter name; empty outside the search state."""
        if self.config.state != "search":
            return {}
        return {name: part.scores for name, part in masking.masked_weights(self._scored()).items()}

    def masks(self) -> dict[str, Tensor]:
        """Return the masks by backbone parameter name, True = kept; all True in the dense state."""
        prunables = self.prunables()
        if self.config.state == "search":
            applied = {name: part.mask for name, part in masking.masked_weights(self._scored()).items()}
            weights = self.prunable_weights()
            return masking.split_like(self.pattern.completed(applied, weights), weights)
        if self.config.state == "frozen":
            return masking.frozen_masks(prunables)
        return masking.all_kept(prunables)

    @property
    def sparsity(self) -> float:
        """Measured fraction of the prunable weights that are masked; frozen ones count only where they are zero.

        Raises:
            ValueError: there is no prunable weight, as where quantisation has replaced all layers.
        """
        masks = self._measured_masks().values()
        if not masks:
            raise ValueError(
                "This model has no prunable weight, so no sparsity can be measured; its layers were replaced, as "
                "quantisation does."
            )
        return 1 - sharding.count_true(masks) / sum(mask.numel() for mask in masks)

    def _measured_masks(self) -> dict[str, Tensor]:
        frozen = self.config.state == "frozen"
        return masking.nonzero_or_kept(self.prunables()) if frozen else self.masks()

    @checked(sparsity=FRACTION)
    def set_sparsity(self, sparsity: float) -> None:
        """Change the sparsity and select new masks; search state only.

        Raises:
            ValueError: it is outside [0, 1] or above that of the pattern.
        """
        self._require("search", "change the sparsity")
        self.pattern.check(sparsity, self.config.scope)
        self.config.sparsity = sparsity
        self.update_masks()
        self._warn_of_collapse()

    def update_masks(self) -> int:
        """Select new masks from the scores and return the number of entries that changed; search state only."""
        self._require("search", "update masks")
        return masking.update_masks(self._scored(), self.config.sparsity, self.config.scope, self.pattern)

    @checked(weight=NUMBER)
    def set_implicit_gradient(self, weight: float) -> None:
        """Add BiP's implicit gradient to that of the scores (arXiv 2210.04092); search state only.

        It is quadratic in the gradient: with gradient accumulation and on several processes it is that of each
        micro-batch, summed.

        Args:
            weight: factor 1 / gamma of the implicit gradient; 0 omits it.
        """
        self._require("search", "set the implicit gradient")
        for part in masking.masked_weights(self._scored()).values():
            part.implicit_gradient = weight

    def _warn_of_collapse(self) -> None:
        """Warn once of each layer that keeps no weight."""
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
        """Report kept and total weights, bytes and multiply-accumulates of every prunable layer."""
        size, kwargs = self.config.image_size, self._backbone_kwargs
        return measure_sparsity(
            self.backbone, self.prunables(), self._measured_masks(), size, kwargs, self.config.pattern
        )

    @checked(signed=FLAG)
    def attach_scores(self, signed: bool = False) -> None:
        """Attach scores and masks to the prunable weights (dense to search); scores and prompt become trainable.

        Args:
            signed: whether the scores themselves are ranked and start at zero (movement pruning). Otherwise their
                absolute values are ranked, and they start in proportion to the weights (HYDRA, VPNs).
        """
        self._require("dense", "attach scores")
        self.gather_shards()
        masking.attach_scores(self.prunables(), signed, self.pattern)
        self.config.state, self.config.signed_scores = "search", signed
        self.train_only(*SEARCH_ROLES)
        self.update_masks()
        self._warn_of_collapse()

    def detach_scores(self) -> None:
        """Remove scores and masks (search to dense); all parameters become trainable."""
        self._require("search", "detach scores")
        self.gather_shards()
        masking.detach_scores(self._scored())
        self.config.state, self.config.signed_scores = "dense", False
        self.train_only(*ROLES)

    def freeze_masks(self) -> None:
        """Write the zeros into the weights and remove the scores (search to frozen); all parameters become trainable.

        Pruned weights get no gradient afterwards and are zeroed after every step of a `torch.optim.Optimizer`, so they
        stay exactly zero in any training loop.
        """
        self._require("search", "freeze masks")
        self.apply_masks(self.masks())

    def apply_masks(self, masks: Mapping[str, Tensor]) -> int:
        """Freeze the model with masks found elsewhere, or replace masks that are frozen already.

        Args:
            masks: bool tensors by backbone parameter name, True = kept; one for each prunable weight.

        Returns:
            The number of entries that changed. Weights that were pruned before restart at zero.

        Raises:
            ValueError: names or shapes differ from those of `masks()`, or they do not have the model's pattern.
        """
        prunables = self.prunables()
        masking.check_masks(masks, prunables)
        masking.check_pattern(masks, self.pattern, "build the model with the pattern that they have")
        own = self.masks()
        masks = {name: sharding.arranged_like(mask.detach().clone().bool(), own[name]) for name, mask in masks.items()}
        if self.config.state == "frozen":
            flips = masking.change_frozen_masks(prunables, masks)
        else:
            flips = sharding.count_true(mask ^ masks[name].to(mask.device) for name, mask in own.items())
            masks = {name: sharding.whole(mask) for name, mask in masks.items()}
            self.gather_shards()
            if self.config.state == "search":
                self.detach_scores()
            masking.freeze(self.prunables(), masks)
            self.config.state = "frozen"
            self.train_only(*ROLES)
            self._mask_gradients()
        self.config.sparsity = self.sparsity
        self._warn_of_collapse()
        return flips

    def remove_channels(self) -> None:
        """Cut the pruned channels out of the model, whose layers become smaller; frozen masks of `"channels"` alone.

        The configuration builds the smaller layers, so the model is saved, loaded and exported as any other, without
        Torch-Pruning. Where all MLPs have one width and nothing else was cut, the backbone is a stock model of
        transformers with another `intermediate_size` (or `mlp_ratio`). Optimizers hold the old parameters: build new
        ones. What is left is unpruned, `sparsity` 0, and can be pruned again.

        Raises:
            ValueError: the model is not frozen or has another pattern, a layer keeps no channel, or the smaller model
                does not give the same logits on a random image.
        """
        self._require("frozen", "remove channels")
        remove_channels(self)

    def merge_and_unload(self) -> PreTrainedModel:
        """Return the plain backbone with the zeros written in; this wrapper must not be used afterwards.

        With `keep_source_head` or a `"bayesian"` label mapping the plain model still has all source classes.

        Raises:
            ValueError: a pruned weight is not zero any more.
        """
        self.gather_shards()
        if self.config.state == "search":
            self.freeze_masks()
        if self.config.state == "frozen":
            masking.check_zeros(self.prunable_weights(), self.masks(), masking.ZEROS_LOST)
            masking.unfreeze(self.prunables())
        share_labels(self.config, self.backbone.config)
        return self.backbone

    def _require(self, state: str, action: str) -> None:
        if self.config.state != state:
            raise ValueError(
                f"Cannot {action}: the model is in the {self.config.state!r} state, and this needs {state!r}."
            )

    def backbone_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by their names in the dense backbone, in any state; not copied.

        Scores and masks are left out; in the frozen state pruned weights are zero.
        """
        return masking.dense_state(self.backbone)

    @torch.no_grad()
    def rewind(self, state: Mapping[str, Tensor]) -> None:
        """Rewind the backbone to values of [`~PromptedSparseModel.backbone_state`]; masks and scores stay.

        Raises:
            ValueError: the names differ from those of this backbone.
        """
        own = self.backbone_state()
        if unknown := sorted(set(state) ^ set(own)):
            raise ValueError(
                f"The saved state belongs to another backbone: {len(unknown)} names differ, such as {unknown[0]}."
            )
        if wrong := [name for name in own if own[name].shape != state[name].shape]:
            raise ValueError(
                f"The saved state belongs to another backbone: {len(wrong)} shapes differ, such as that of {wrong[0]}."
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        if self.config.state == "frozen":
            self.zero_masked_weights()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dictionary as any module does; pruned weights get no gradient afterwards, also with `assign`.

        Raises:
            ValueError: in the frozen state, a weight is not zero where the mask that it comes with, or else that of
                this model, is False. Nothing is loaded then.
        """
        masking.check_state(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Apply a function to every module, as any module does; frozen zeros are written again afterwards."""
        super().apply(fn)
        if self.config.state == "frozen":
            self.zero_masked_weights()
        return self

    def zero_masked_weights(self) -> None:
        """Write the zeros into pruned weights, for training loops that overwrite parameters; frozen state only."""
        self._require("frozen", "write zeros")
        masking.zero_masked_weights(self.prunables())

    def replace_with(self, other: SparseModel) -> None:
        """Take over weights, state and configuration of another model, so that references to this one stay valid."""
        self.__setstate__(other.__dict__)

    def rebuilt(self, config: PromptedSparseConfig) -> Self:
        """Build a model without loading weights, with the trainable parameters and the mode of this one."""
        trainable = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        with torch.device(self.device):
            # The class of a sharded module constructs the plain one.
            model = type(self)(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        model.image_processor = self.image_processor
        return model.train(self.training)

    def shard_masks(self) -> None:
        """Shard the masks like the weights, right after `torch.distributed.fsdp.fully_shard(model)`.

        Masks are then selected without gathering the scores, and pruned weights get no gradient. A model that is not
        sharded stays unchanged.
        """
        if self.config.state != "dense" and sharding.is_sharded(self.parameters()):
            owners = self._scored() if self.config.state == "search" else self.prunables()
            masking.shard_masks(owners, self.config.state)

    def gather_shards(self) -> None:
        """Gather a sharded model on every process, which undoes `fully_shard`; all processes call this together.

        Methods that change the state of the model or the shape of its head call this, because `fully_shard` does not
        support such changes. A model that is not sharded stays unchanged.
        """
        if not sharding.is_sharded(self.parameters()):
            return
        whole = self.rebuilt(copy.deepcopy(self.config))
        whole.load_state_dict(sharding.full_state(self, on_every_process=True), assign=True)
        sharding.forget(self)
        self.__class__ = type(whole)
        self.replace_with(whole)
