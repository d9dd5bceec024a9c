"""`PromptedSparseModel`: an image classifier with masks over its weights and a visual prompt on its input."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput

from .. import hub
from ..masking.channels import CHANNELS
from ..masking.recomputation import recomputing
from ..values import FLAG, checked
from . import backbones, checks, saving
from .channel_groups import find_groups
from .class_mapping import map_classes
from .configuration import PromptedSparseConfig
from .head import classification_loss, map_logits
from .labels import label_names, labels_of, set_labels, share_labels
from .outputs import check_outputs, requested_outputs
from .prompts import build_prompt
from .sparse_model import SparseModel
from .subnetworks import fitting_masks, take_prompt

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


class PromptedSparseModel(SparseModel):
    """A pretrained image classifier, pruned by masks and reprogrammed by a visual prompt (VPNs, arXiv 2312.01397).

    Build it with [`~PromptedSparseModel.from_backbone`], or load it with `from_pretrained`. The model is in one of
    three states, `config.state`: `"search"` (scores attached, forward masked), `"frozen"` (zeros written in, plain
    weights) or `"dense"` (plain weights, nothing masked).

    Args:
        config: configuration with the state and the backbone.
        backbone: image classifier to wrap; built from `config.backbone_config` when None.

    Attributes:
        image_processor: image processor that is saved, loaded and published with the model, or None.
    """

    config_class = PromptedSparseConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Trainer would otherwise assume that the loss is already divided by the number of accumulated items.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["scores", "prompt", "label_matrix"]  # noqa: RUF012
    # Loss of logits and labels in place of the backbone's own, as one-shot scores of a trainer's loss need it.
    task_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    # Set while the prompt is trained alone: no dropout, and BatchNorm keeps its running statistics.
    eval_backbone = False
    label_matrix: Tensor | None

    def __init__(self, config: PromptedSparseConfig, backbone: PreTrainedModel | None = None):
        share_labels(config, config.backbone_config)
        super().__init__(config, backbone)
        self.prompt = build_prompt(config)
        shape = (config.backbone_config.num_labels, config.num_labels)
        matrix = torch.zeros(shape, dtype=torch.float32) if config.label_mapping == "bayesian" else None
        self.register_buffer("label_matrix", matrix)
        self.post_init()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; with `eval_backbone` the backbone stays in evaluation mode."""
        super().train(mode)
        if self.eval_backbone:
            self.backbone.eval()
        return self

    def init_weights(self) -> None:
        """Do nothing: weights come with the backbone, scores follow from them, and prompts set their own."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        if not self.backbone.supports_gradient_checkpointing:
            raise ValueError(
                f"transformers has no activation checkpointing for {type(self.backbone).__name__}; leave it out, or "
                "lower the batch size and raise `gradient_accumulation_steps`."
            )
        self.backbone._set_gradient_checkpointing(*args, **kwargs)

    def get_input_embeddings(self) -> None:
        """Return None: images have no token embeddings, which accelerate would shard separately."""

    @classmethod
    @checked(**checks.SETTINGS)
    def from_backbone(
        cls,
        backbone: str | nn.Module,
        *,
        sparsity: float | None = None,
        scope: str = "global",
        pattern: str = "unstructured",
        budget: str | None = None,
        channel_multiple: int = 1,
        prompt: str | None = "pad",
        prompt_size: int = 16,
        prompt_inner_size: Sequence[int] | int | None = None,
        label_mapping: str | None = None,
        new_head: bool | None = None,
        keep_source_head: bool = False,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        ignore_modules: Sequence[str] = (),
        image_processor: BaseImageProcessor | None = None,
        image_size: Sequence[int] | int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Wrap a pretrained image classifier in the *search* state: scores attached, mask selected, weights frozen.

        Args:
            backbone: Hub id, local folder, or a model object, which is wrapped, not copied: a transformers image
                classifier or a timm model (by way of transformers' `TimmWrapperForImageClassification`).
            sparsity: fraction of the prunable weights to remove, in [0, 1); None: that of the pattern, else 0.9.
            scope: `"global"`, `"layer"` or `"erk"`.
            pattern: `"unstructured"`, `"n:m"` such as `"2:4"`, `"block:32"`, or `"channels"` (see
                [`masking.patterns`]).
            budget: with `"channels"`, what is removed: `"channels:0.5"`, `"parameters:0.5"` or `"macs:0.5"`; without a
                number, the unit of `sparsity`.
            channel_multiple: with `"channels"`, number that widths are multiples of, such as 8.
            prompt: `"pad"`, `"fixed"`, `"random"`, `"expand"`, `"stripe"`, `"lowrank"` (see [`prompts`]), or None.
            prompt_size: width or side of the prompt in pixels; the rank of `"lowrank"`.
            prompt_inner_size: (height, width) or side to which a prompted image is shrunk; None overlays the prompt
                (`"expand"` then shrinks the image by `prompt_size` on each side).
            label_mapping: `"random"`, `"frequency"`, `"optimal"`, `"iterative"` or `"bayesian"`, which keep the
                pretrained head and map its classes to those of the task (see [`label_mapping.map_labels`]), or None.
            new_head: whether the head is newly initialised. None: when the label count differs or the checkpoint has
                no head. A new head is never pruned.
            keep_source_head: whether the head keeps all source classes under a mapping; always for `"bayesian"`.
            num_labels, id2label: the labels of the downstream task; None: the backbone's own.
            ignore_modules: names (or their ends) of modules that are never pruned.
            image_processor: source of size, mean and std that are not passed; None: the one saved with the backbone.
            image_size, image_mean, image_std: (height, width) or side of the input in pixels, and its normalisation.
            kwargs: arguments of `from_pretrained` for a `backbone` given by name (`revision`, `token`, `dtype`, ...).
                Weights load in float32 unless `dtype` says otherwise.

        Raises:
            ValueError: no image classifier, nothing to prune, settings that do not fit together.
            OSError: the backbone cannot be found.
        """
        labels = label_names(num_labels, id2label)
        checks.check_settings(label_mapping, new_head, labels)
        unit, sparsity = checks.split_budget(budget, sparsity)
        sparsity = checks.final_sparsity(sparsity, scope, pattern)
        model, fresh_head, image_processor = backbones.load_backbone(
            backbone, None if label_mapping else labels, new_head, image_processor, kwargs
        )
        labels = labels or labels_of(model.config)
        geometry = backbones.image_geometry(model.config, image_processor, image_size, image_mean, image_std)
        head = backbones.head_parameters(model)
        channels = {} if pattern != CHANNELS else find_groups(model, ignore_modules, head, fresh_head, geometry)
        config = PromptedSparseConfig(
            backbone_config=backbones.config_of(model),
            sparsity=sparsity,
            scope=scope,
            pattern=pattern,
            channel_budget=unit,
            channel_multiple=channel_multiple,
            **channels,
            ignore_modules=list(ignore_modules),
            head_parameters=head,
            new_head=fresh_head,
            prompt=prompt,
            prompt_size=prompt_size,
            prompt_inner_size=backbones.height_width(prompt_inner_size),
            label_mapping=label_mapping,
            keep_source_head=keep_source_head,
            id2label=labels,
            **geometry,
        )
        set_labels(config, labels)
        wrapped = cls(config, model)
        if geometry == backbones.image_geometry(model.config, image_processor):
            wrapped.image_processor = backbones.savable(image_processor)
        checks.check_wrapped(wrapped)
        wrapped.attach_scores()
        return wrapped

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], packed: bool | None = None, **kwargs: Any
    ) -> None:
        """Save configuration and weights; other arguments as for any transformers model.

        Args:
            save_directory: folder, created if needed. Files appear in it once they are complete.
            packed: whether kept values and coded masks are stored instead of all weights. None: when masks are frozen.

        Raises:
            ValueError: `packed=True` while the masks are not frozen, or `push_to_hub=True`.
        """
        saving.save(self, save_directory, packed, super().save_pretrained, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a model saved by `save_pretrained`, packed or not; arguments as for any transformers model.

        Raises:
            ValueError: a file is damaged, does not hold the tensors that the configuration promises, or holds NaN in
                the prompt or in a kept weight of a packed file.
            OSError: there is no such model or revision, it is private, or the Hub cannot be reached.
        """
        return saving.load(cls, str(pretrained_model_name_or_path), super().from_pretrained, *args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        packed: bool | None = None,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | None = None,
        token: bool | str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Publish the model, its image processor if known, and a short model card, in one commit.

        A push that fails leaves the files in the repository as they were. An existing card is updated, and
        text that people wrote stays. To publish all files of a run, call [`VPNsTrainer.push_to_hub`] or
        [`hub.push_folder`].

        Args:
            repo_id: repository `user/name`, created if needed.
            packed: as in [`~PromptedSparseModel.save_pretrained`].
            max_shard_size: largest size of a weight file before packing, such as `"5GB"`.
            tags: additional tags of the card.
            token: token of an account with write access; None: that of `hf auth login`.
            kwargs: further arguments of [`hub.push_folder`]: `commit_message`, `commit_description`, `private`,
                `revision` and `create_pr`.

        Raises:
            OSError: the Hub cannot be reached or refuses.
        """
        repo_id = hub.full_repo_id(repo_id, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, packed=packed, max_shard_size=max_shard_size)
            self.short_card(repo_id, tags or ()).save(Path(folder) / hub.CARD_NAME)
            return hub.push_folder(folder, repo_id, token=token, **kwargs)

    def short_card(self, title: str, tags: Sequence[str] = (), **metadata: Any) -> ModelCard:
        """Write a short model card: backbone, sparsity, and how to load the model.

        Args:
            title: heading of the card, and the name that its code loads: `user/name` or a folder.
            tags, metadata: additional metadata, such as `license` or `datasets`.
        """
        return saving.short_card(self, title, tags, metadata)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        use_prompt: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: normalised images, [n, channels, height, width].
            labels: class ids [n], or class probabilities [n, num_labels]; for `multi_label_classification` zeros and
                ones [n, num_labels].
            use_prompt: whether the visual prompt is added; None: `config.use_prompt`.
            output_attentions, output_hidden_states: whether those of the backbone are returned; None: as the
                configuration says.

        Returns:
            `logits` [n, num_labels] and, with labels, the mean cross-entropy `loss`, binary for several labels an
            image; `attentions` and `hidden_states` where they are requested. Until a label mapping is set, the logits
            are those of the source classes.

        Raises:
            ValueError: a prompt is requested, but the model has none; or the backbone does not return the attentions
                or hidden states that are requested.
        """
        extras = requested_outputs(self.config, output_attentions, output_hidden_states)
        output = self._run_backbone(pixel_values, use_prompt, extras)
        logits = map_logits(output.logits, self.config, self.label_matrix)
        loss = None if labels is None else self.loss(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, **{name: output[name] for name in extras})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of logits [n, num_labels]: `task_loss`, or without one that of the backbone's problem."""
        if self.task_loss is not None:
            return self.task_loss(logits, labels)
        return classification_loss(logits, labels, self.config.backbone_config.problem_type)

    def head_logits(self, pixel_values: Tensor, use_prompt: bool | None = None) -> Tensor:
        """Compute the logits of the head before any label mapping, [n, classes].

        Args:
            pixel_values: normalised images, [n, channels, height, width].
            use_prompt: whether the visual prompt is added; None: `config.use_prompt`.

        Raises:
            ValueError: a prompt is requested, but the model has none.
        """
        return self._run_backbone(pixel_values, use_prompt).logits

    def _run_backbone(self, pixel_values: Tensor, use_prompt: bool | None, extras: Sequence[str] = ()) -> ModelOutput:
        if use_prompt not in (None, True, False):
            raise ValueError(f"`use_prompt` is {use_prompt!r}; expected None, True or False.")
        if self.config.use_prompt if use_prompt is None else use_prompt:
            if self.prompt is None:
                raise ValueError('`use_prompt=True`, but this model has no prompt; build it with `prompt="pad"`.')
            pixel_values = self.prompt(pixel_values)
        with recomputing() if self.config.state == "search" else nullcontext():
            requests = self._backbone_kwargs | {f"output_{name}": True for name in extras}
            output = self.backbone(pixel_values=pixel_values, **requests)
        check_outputs(output, extras, type(self.backbone).__name__)
        return output

    def for_inference(self, example: Tensor, **kwargs: Any) -> Any:
        """Copy a frozen model for faster inference on this CPU, with sparse kernels where they are measured faster.

        Layers and the whole model are timed with the threads that torch uses now; what is not faster stays dense.
        Logits equal those of this model up to rounding.

        Args:
            example: normalised images of the shape to serve, float32 [n, channels, height, width]; other batch sizes
                work, too.
            kwargs: arguments of [`inference.build_fast_model`].

        Returns:
            A plain module in evaluation mode, [`inference.FastModel`], with `logits` in its output and a `report`.

        Raises:
            ValueError: masks are not frozen, or model or example are not float32 on the CPU.
        """
        from ..inference import build_fast_model

        return build_fast_model(self, example, **kwargs)

    @checked(prompt=FLAG)
    def load_subnetwork(
        self, pretrained_model_name_or_path: str | os.PathLike[str], prompt: bool = True, **kwargs: Any
    ) -> None:
        """Freeze this model with the masks of a shared subnetwork; its weights stay this model's own.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a subnetwork of the same backbone. Masks of its head
                are left out where this model has a new one, which is never pruned.
            prompt: whether its visual prompt, if any, is taken over, too.
            kwargs: arguments of `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: it is not pruned, or its tensors or the images of its prompt are not those of this model.
        """
        other = type(self).from_pretrained(pretrained_model_name_or_path, **kwargs)
        name = str(pretrained_model_name_or_path)
        masks = fitting_masks(self, other, name)
        if prompt and other.prompt is not None:
            take_prompt(self, other, name, "pass `prompt=False` to load its masks alone")
        self.apply_masks({name: mask.to(self.device) for name, mask in masks.items()})

    def load_prompt(self, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Take over the visual prompt of a shared subnetwork, of this or another backbone, and nothing else.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a saved [`PromptedSparseModel`].
            kwargs: arguments of `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: it has no prompt, or one for other images.
        """
        other = type(self).from_pretrained(pretrained_model_name_or_path, **kwargs)
        if other.prompt is None:
            raise ValueError(f"{pretrained_model_name_or_path} has no prompt; name a model that was saved with one.")
        take_prompt(self, other, str(pretrained_model_name_or_path), "choose one for the same images")

    def set_label_mapping(self, mapping: Tensor | Sequence[int], final: bool = True) -> None:
        """Map the source classes of the head to the target classes, in any state.

        Args:
            mapping: source class of each target class, integers [num_labels]; with `label_mapping="bayesian"` weights
                [source, num_labels] (see [`label_mapping.map_labels`]).
            final: whether this mapping is the last. With False the head keeps all source classes and another mapping
                may follow. With True a one-to-one mapping slices the head and its masks to the mapped classes, unless
                `keep_source_head`; in the search state new masks are then selected.

        Raises:
            ValueError: the model was not built with a label mapping, has a final one already, or this one does not
                fit.
        """
        map_classes(self, mapping, final)
