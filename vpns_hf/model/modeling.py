"""`PromptedSparseModel`: an image classifier with masks over its weights and a visual prompt on its input."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import CONFIG_NAME

from .. import hub, masking
from ..label_mapping import get_label_mapping
from ..masking.recomputation import recomputing
from ..saved_files import read_json
from . import backbones, packed_shards
from .configuration import PromptedSparseConfig
from .head import checked_classes, checked_matrix, map_logits, take_classes
from .loading import check_zeros, in_one_sentence, load_image_processor, no_larger_than
from .prompts import build_prompt
from .sparse_model import SparseModel

PROMPT_TENSORS = ("prompt", "label_matrix")
PROMPT_FIELDS = ("prompt", "prompt_size", "prompt_inner_size", "image_size", "image_mean", "image_std", "use_prompt")


class PromptedSparseModel(SparseModel):
    """A pretrained image classifier, pruned by masks and reprogrammed by a visual prompt (VPNs, arXiv 2312.01397).

    Made by [`~PromptedSparseModel.from_backbone`], or loaded by `from_pretrained`. The model is in one of three
    states, `config.state`: `"search"` (scores attached, forward masked), `"frozen"` (zeros written in, plain weights)
    or `"dense"` (plain weights, nothing masked).

    Args:
        config: see [`PromptedSparseConfig`].
        backbone: the image classifier to wrap; built from `config.backbone_config` when None.

    Attributes:
        image_processor: saved, loaded and published with the model; None where none is known.
    """

    config_class = PromptedSparseConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Trainer would otherwise believe that the loss is already divided by the number of accumulated items.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # An update of 1e-4 vanishes in half precision.
    _keep_in_fp32_modules_strict = ["scores", "prompt", "label_matrix"]  # noqa: RUF012
    # Set while the prompt is trained alone: no dropout, and BatchNorm keeps its running statistics.
    eval_backbone = False
    label_matrix: Tensor | None

    def __init__(self, config: PromptedSparseConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.prompt = build_prompt(config)
        shape = (config.backbone_config.num_labels, config.num_labels)
        matrix = torch.zeros(shape, dtype=torch.float32) if config.label_mapping == "bayesian" else None
        self.register_buffer("label_matrix", matrix)
        self.post_init()

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; with `eval_backbone` the backbone stays in evaluation mode."""
        super().train(mode)
        if self.eval_backbone:
            self.backbone.eval()
        return self

    def init_weights(self) -> None:
        """Draw nothing: the backbone brings its weights, scores follow from them, prompts set their own."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        if not self.backbone.supports_gradient_checkpointing:
            raise ValueError(
                f"transformers has no activation checkpointing for {type(self.backbone).__name__}; leave it out, or "
                "lower the batch size and raise `gradient_accumulation_steps`."
            )
        # timm has its own way.
        self.backbone._set_gradient_checkpointing(*args, **kwargs)

    def get_input_embeddings(self) -> None:
        """None: images have no embeddings of tokens, which accelerate would shard on their own."""

    # Building --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | nn.Module,
        *,
        sparsity: float = 0.9,
        scope: str = "global",
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
        """Wrap a pretrained image classifier, in the *search* state: scores attached, first mask selected, weights
        frozen.

        Args:
            backbone: Hub id, local folder, or a model object: a transformers image classifier or a timm model. A model
                object is wrapped, not copied. timm models are wrapped by transformers'
                `TimmWrapperForImageClassification`.
            sparsity: fraction of the prunable weights to remove, in [0, 1).
            scope: `"global"`, `"layer"` or `"erk"`.
            prompt: `"pad"`, `"fixed"`, `"random"`, `"expand"`, `"stripe"`, `"lowrank"` (see [`prompts`]), or None.
            prompt_size: width or side of the prompt in pixels; the rank of `"lowrank"`.
            prompt_inner_size: (height, width) or side to which a prompted image is shrunk; None overlays the prompt
                (`"expand"` then shrinks the image by `prompt_size` on each side).
            label_mapping: None, or `"random"`, `"frequency"`, `"optimal"`, `"iterative"` or `"bayesian"`
                (see [`label_mapping.map_labels`]): keep the pretrained head and find the source classes of each target
                class.
            new_head: whether the classifier is created anew. None: when the label count differs or the checkpoint has
                no head. A new head is never pruned.
            keep_source_head: with a label mapping, keep every source class in the head instead of the mapped ones.
                `"bayesian"` always keeps them.
            num_labels, id2label: the labels of the downstream task; None: the backbone's own.
            ignore_modules: names (or their ends) of modules that are never pruned.
            image_processor: gives image size, mean and std where they are not passed; None: looked up beside the
                backbone.
            image_size, image_mean, image_std: the model's input: (height, width) or side in pixels, and its
                normalisation.
            kwargs: passed to `from_pretrained` when `backbone` is a string (`revision`, `token`, `dtype`, ...).
                Weights load in float32 unless `dtype` says otherwise.

        Raises:
            ValueError: no image classifier, nothing to prune, settings that do not fit together.
            OSError: the backbone cannot be found.
        """
        labels = backbones.label_names(num_labels, id2label)
        if label_mapping is not None:
            get_label_mapping(label_mapping)
        if label_mapping is not None and (new_head or labels is None):
            raise ValueError(
                "A label mapping keeps the pretrained head: pass `num_labels` or `id2label` of the task, and no "
                "`new_head`."
            )
        masking.kept_count(0, sparsity)
        model, fresh_head, image_processor = backbones.load_backbone(
            backbone, None if label_mapping else labels, new_head, image_processor, kwargs
        )
        geometry = backbones.image_geometry(model.config, image_processor, image_size, image_mean, image_std)
        config = PromptedSparseConfig(
            backbone_config=backbones.config_of(model),
            sparsity=sparsity,
            scope=scope,
            ignore_modules=list(ignore_modules),
            head_parameters=backbones.head_parameters(model),
            new_head=fresh_head,
            prompt=prompt,
            prompt_size=prompt_size,
            prompt_inner_size=backbones.height_width(prompt_inner_size),
            label_mapping=label_mapping,
            keep_source_head=keep_source_head,
            id2label=dict(labels or model.config.id2label),
            **geometry,
        )
        backbones.set_labels(config, config.id2label)
        wrapped = cls(config, model)
        if geometry == backbones.image_geometry(model.config, image_processor):
            wrapped.image_processor = backbones.savable(image_processor)
        if not wrapped.slots():
            raise ValueError(
                f"{type(model).__name__} has no prunable weight: no linear or convolution layer outside "
                "`ignore_modules` and a new head."
            )
        wrapped._try_forward()
        wrapped.attach_scores()
        return wrapped

    def _try_forward(self) -> None:
        """Run one black image through the model, so that a wrong image size fails before any work starts."""
        if self.config.image_size is None:
            return
        channels = len(self.config.image_mean) if self.config.image_mean else 3
        image = torch.zeros(1, channels, *self.config.image_size, device=self.device, dtype=self.dtype)
        training = self.training
        try:
            with torch.no_grad():
                self.eval()(image)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"{type(self.backbone).__name__} does not accept images of {tuple(self.config.image_size)} (height, "
                f"width) with {channels} channels: {error}"
            ) from error
        self.train(training)

    # Saving and loading ----------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], packed: bool | None = None, **kwargs: Any
    ) -> None:
        """Save configuration and weights; other arguments as for any transformers model.

        Args:
            save_directory: folder, made if needed. Files take their place in it when they are complete.
            packed: store the kept values and a coded mask instead of every weight. None: when the masks are frozen.

        Raises:
            ValueError: `packed=True` while the masks are not frozen, or `push_to_hub=True`.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("`save_pretrained` only saves; call `push_to_hub('user/repo')` to publish the model.")
        if packed and self.config.state != "frozen":
            raise ValueError(
                f"Only frozen masks can be packed; the model is in the {self.config.state!r} state. Call "
                "`freeze_masks()` first."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            if packed or (packed is None and self.config.state == "frozen"):
                self._save_packed(name, **kwargs)
            else:
                super().save_pretrained(name, **kwargs)
            if self.image_processor is not None and kwargs.get("is_main_process", True):
                self.image_processor.save_pretrained(name)
            weights = list(Path(name).glob("*.safetensors"))
            # Processes other than the main one write no weights and must not remove those that it wrote.
            for stale in folder.glob("model*.safetensors*") if weights else ():
                stale.unlink()
            for file in Path(name).iterdir():
                os.replace(file, folder / file.name)

    def _save_packed(self, folder: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        self._check_prompt()
        names = ("max_shard_size", "variant", "save_original_format")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        # Everything but the weights; where this process is to write them, a file with one number stands for them.
        super().save_pretrained(folder, state_dict={"placeholder": torch.zeros(1)}, **kwargs)
        for placeholder in Path(folder).glob("*.safetensors"):
            placeholder.unlink()
            state = self.state_dict() if state_dict is None else state_dict
            packed_shards.save_weights(Path(folder), self, state, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a model saved by `save_pretrained`, packed or not; arguments as for any transformers model.

        Raises:
            ValueError: a file is damaged, does not hold the tensors that the configuration promises, or holds NaN in
                the prompt or in a kept weight of a packed file.
            OSError: there is no such model or revision, it is private, or the Hub cannot be reached.
        """
        name = str(pretrained_model_name_or_path)
        with hub.clear_errors(f"Could not load {name}", kwargs.get("revision")):
            kwargs["revision"] = hub.pinned_revision(name, kwargs)
            config_file = hub.find_file(name, CONFIG_NAME, kwargs)
            if "config" not in kwargs and config_file is None:
                place = "/".join(filter(None, (name, kwargs.get("subfolder"))))
                raise OSError(f"{place} holds no saved model: there is no {CONFIG_NAME} in it.")
            if config_file is not None:
                read_json(Path(config_file))  # refuses what transformers would stumble over
            with in_one_sentence(name):
                return cls._from_pretrained(name, *args, **kwargs)

    @classmethod
    def _from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        files = packed_shards.find_packed_files(
            name, lambda file: hub.find_file(name, file, kwargs), kwargs.get("variant")
        )
        # Tensors of another shape are refused below, by one error for all that is wrong.
        kwargs |= {"ignore_mismatched_sizes": True, "use_safetensors": True}
        size = packed_shards.unpacked_size(lambda file: hub.find_file(name, file, kwargs), kwargs.get("variant"))
        with packed_shards.open_state_dict(files) as state_dict, no_larger_than(size):
            if files:
                config = kwargs.get("config") or cls.config_class.from_pretrained(name, **hub.hub_kwargs(kwargs))
                kwargs |= {"config": config, "state_dict": state_dict}
            model, info = super().from_pretrained(None if files else name, *args, output_loading_info=True, **kwargs)
        wrong = [
            *(f"{key} is missing" for key in sorted(info["missing_keys"])),
            *(f"{key} has shape {tuple(found)}" for key, found, _ in sorted(info["mismatched_keys"])),
            *(f"{key} is unknown" for key in sorted(info["unexpected_keys"]) if files),
        ]
        if wrong:
            raise ValueError(
                f"{name} does not hold the tensors that its config.json describes: {len(wrong)} are missing, unknown "
                f"or have another shape; {wrong[0]}. The download may be incomplete."
            )
        model._check_prompt()
        model.name_or_path = model.config.name_or_path = name
        if model.config.state == "frozen":
            check_zeros(model.slots())
        model._mask_gradients()
        model.image_processor = load_image_processor(name, kwargs)
        return (model, info) if wants_info else model

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

        A push that fails leaves the files in the repository as they were. A card that is there is merged into: what
        people wrote stays. To publish all that a run has written, call [`VPNsTrainer.push_to_hub`] or
        [`hub.push_folder`].

        Args:
            repo_id: `user/name`; created if needed.
            packed: as in [`~PromptedSparseModel.save_pretrained`].
            max_shard_size: largest size of a weight file before packing, such as `"5GB"`.
            tags: further tags of the card.
            token: of an account that may write; None: that of `hf auth login`.
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
        """A model card of what the model itself knows: what it is, how sparse, how to load it.

        Args:
            title: heading of the card, and where its code loads the model from: `user/name`, or a folder.
            tags, metadata: further metadata, such as `license` or `datasets`.
        """
        masks = self.masks().values()
        kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        source = self.config.backbone_config.name_or_path
        return hub.short_card(
            title,
            tags,
            {"base_model": source if "/" in source else None} | metadata,
            backbone=type(self.backbone).__name__,
            labels=self.config.num_labels,
            state=self.config.state,
            kept=f"{kept / total:.2%}",
            kept_weights=f"{kept:,}",
            prunable_weights=f"{total:,}",
            has_prompt=self.prompt is not None,
        )

    def _check_prompt(self) -> None:
        own = {name: tensor for name, tensor in self.state_dict().items() if name.split(".")[0] in PROMPT_TENSORS}
        # What is left on the disk, on the meta device, cannot be looked at.
        if broken := [name for name, tensor in own.items() if not tensor.is_meta and tensor.isnan().any()]:
            raise ValueError(f"{broken[0]} of this model holds NaN; the run diverged, or its file is damaged.")

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, use_prompt: bool | None = None
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: normalised images, [n, channels, height, width].
            labels: class ids [n], or class probabilities [n, num_labels].
            use_prompt: add the visual prompt; None: `config.use_prompt`.

        Returns:
            `logits` [n, num_labels] and, with labels, the mean cross-entropy `loss`. Until a label mapping is set,
            the logits are those of the source classes.

        Raises:
            ValueError: a prompt is asked for and there is none.
        """
        logits = map_logits(self.head_logits(pixel_values, use_prompt), self.config, self.label_matrix)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def head_logits(self, pixel_values: Tensor, use_prompt: bool | None = None) -> Tensor:
        """What the head gives before any label mapping: one logit for each of its classes, [n, classes].

        Args:
            pixel_values: normalised images, [n, channels, height, width].
            use_prompt: add the visual prompt; None: `config.use_prompt`.

        Raises:
            ValueError: a prompt is asked for and there is none.
        """
        if use_prompt is None:
            use_prompt = self.config.use_prompt
        if use_prompt:
            if self.prompt is None:
                raise ValueError('`use_prompt=True`, but this model has no prompt; build it with `prompt="pad"`.')
            pixel_values = self.prompt(pixel_values)
        with recomputing() if self.config.state == "search" else nullcontext():
            return self.backbone(pixel_values=pixel_values, **self._backbone_kwargs).logits

    # Taken from another model ----------------------------------------------------------------------------------------

    def load_subnetwork(
        self, pretrained_model_name_or_path: str | os.PathLike[str], prompt: bool = True, **kwargs: Any
    ) -> None:
        """Freeze this model with the masks of a shared subnetwork; its weights stay this model's own.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a subnetwork of the same backbone. Masks of its head
                are left out where this model has a new one, which is never pruned.
            prompt: take over its visual prompt, too, if it has one.
            kwargs: passed to `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: it is not pruned, its tensors differ from those of this model (all are named), or its prompt is
                made for other images.
        """
        other = type(self).from_pretrained(pretrained_model_name_or_path, **kwargs)
        if other.config.state != "frozen":
            raise ValueError(
                f"{pretrained_model_name_or_path} is in the {other.config.state!r} state, so it holds no fixed masks; "
                "save it after `freeze_masks()`."
            )
        masks = other.masks()
        if self.config.new_head:
            masks = {name: mask for name, mask in masks.items() if name not in self.config.head_parameters}
        if wrong := _differences(self.masks(), masks):
            raise ValueError(
                f"The subnetwork {pretrained_model_name_or_path} does not fit this {type(self.backbone).__name__}:\n"
                + "\n".join(wrong)
            )
        if prompt and other.prompt is not None:
            self._take_prompt(other, f"{pretrained_model_name_or_path}", "pass `prompt=False` to load its masks alone")
        self.apply_masks({name: mask.to(self.device) for name, mask in masks.items()})

    def load_prompt(self, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Take over the visual prompt of a shared subnetwork, of this or another backbone, and nothing else.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a saved [`PromptedSparseModel`].
            kwargs: passed to `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: it has no prompt, or one for other images.
        """
        other = type(self).from_pretrained(pretrained_model_name_or_path, **kwargs)
        if other.prompt is None:
            raise ValueError(f"{pretrained_model_name_or_path} has no prompt; name a model that was saved with one.")
        self._take_prompt(other, f"{pretrained_model_name_or_path}", "choose one for the same images")

    def _take_prompt(self, other: PromptedSparseModel, name: str, remedy: str) -> None:
        assert other.prompt is not None
        if self.config.image_size is not None and other.config.geometry != self.config.geometry:
            raise ValueError(
                f"The prompt of {name} is made for {other.config.geometry}, and this model takes "
                f"{self.config.geometry}; {remedy}."
            )
        self.prompt = other.prompt.to(self.device)
        for field in PROMPT_FIELDS:
            setattr(self.config, field, getattr(other.config, field))

    # Labels ----------------------------------------------------------------------------------------------------------

    def set_label_mapping(self, mapping: Tensor | Sequence[int], final: bool = True) -> None:
        """Map the source classes of the head to the target classes, in any state.

        Args:
            mapping: source class of each target class, integers [num_labels]; with `label_mapping="bayesian"` the
                weight of each source class for each target class, floats [source, num_labels]
                (see [`label_mapping.map_labels`]).
            final: whether this mapping stays. With False the head keeps all source classes and another mapping may
                follow. With True a one-to-one mapping cuts the head, and its masks, down to the mapped classes, unless
                `keep_source_head`; in the search state masks are then selected anew.

        Raises:
            ValueError: the model was not built with a label mapping, has a final one already, or this one does not
                fit.
        """
        if self.config.label_mapping is None or self.config.label_mapping_state == "final":
            raise ValueError(
                "This model takes no label mapping: it was built without `label_mapping`, or a final one is already "
                "set."
            )
        if self.label_matrix is not None:
            self.label_matrix.copy_(checked_matrix(mapping, self.label_matrix.shape))
        else:
            mapped = checked_classes(mapping, self.config.num_labels, self.config.backbone_config.num_labels)
            if final and not self.config.keep_source_head:
                return self._slice_head(mapped)
            self.config.mapped_labels = mapped
        self.config.label_mapping_state = "final" if final else "open"

    def _slice_head(self, mapped: list[int]) -> None:
        self.unshard()
        config = copy.deepcopy(self.config)
        config.mapped_labels, config.label_mapping_state = mapped, "final"
        backbones.set_labels(config.backbone_config, config.id2label)
        sliced = self._rebuilt(config)
        sliced.load_state_dict(take_classes(self.state_dict(), sliced.state_dict(), mapped), assign=True)
        self.replace_with(sliced)
        if self.config.state == "search":
            self.update_masks()
        elif self.config.state == "frozen":
            self.config.sparsity = self.sparsity


def _differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """One line for every tensor that two models do not share."""
    missing = [f"{name}: not in the subnetwork" for name in own if name not in other]
    surplus = [f"{name}: not in this model" for name in other if name not in own]
    shapes = [
        f"{name}: {tuple(other[name].shape)} in the subnetwork, {tuple(mask.shape)} here"
        for name, mask in own.items()
        if name in other and other[name].shape != mask.shape
    ]
    return missing + surplus + shapes
