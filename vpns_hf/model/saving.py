"""Save a model packed or plain, and load it again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers.utils import CONFIG_NAME

from .. import hub
from ..masking.frozen import ZEROS_LOST, check_pattern, check_zeros
from ..saved_files import read_json
from ..saved_folder import current_folder, replacing
from ..values import FLAG, PATH, Check, checked, count, either, optional, require
from . import packed_shards
from .labels import share_labels
from .loading import in_one_sentence, load_image_processor, no_larger_than, warn_of_other_images
from .sparse_model import SEARCH_ROLES

if TYPE_CHECKING:
    from .modeling import PromptedSparseModel

PROMPT_TENSORS = ("prompt", "label_matrix")
_SHARD_SIZE = either(
    count(1, 2**62), Check("a size such as '5GB'", lambda value: bool(re.fullmatch(r"[1-9]\d*[KMGT]B", str(value))))
)


@checked(save_directory=PATH, packed=optional(FLAG))
def save(
    model: PromptedSparseModel,
    save_directory: str | os.PathLike[str],
    packed: bool | None,
    save_plain: Callable[..., None],
    **kwargs: Any,
) -> None:
    """Write a model into a folder; see [`PromptedSparseModel.save_pretrained`].

    Args:
        model: the model.
        save_directory: the folder.
        packed: whether masks are coded; None: when they are frozen.
        save_plain: the model's `save_pretrained` as transformers defines it.
        kwargs: further arguments of `save_plain`.
    """
    if kwargs.pop("push_to_hub", False):
        raise ValueError("`save_pretrained` only saves; call `push_to_hub('user/repo')` to publish the model.")
    if packed and model.config.state != "frozen":
        raise ValueError(
            f"Only frozen masks can be packed; the model is in the {model.config.state!r} state. Call "
            "`freeze_masks()` first."
        )
    if model.config.state == "frozen":
        check_zeros(model.prunable_weights(), model.masks(), ZEROS_LOST)
    share_labels(model.config, model.config.backbone_config)
    if "max_shard_size" in kwargs:
        require("max_shard_size", kwargs["max_shard_size"], _SHARD_SIZE)
    if Path(save_directory).exists() and not Path(save_directory).is_dir():
        raise FileExistsError(f"{save_directory} is a file; name a folder to save to.")
    with replacing(Path(save_directory)) as folder:
        if packed or (packed is None and model.config.state == "frozen"):
            _save_packed(model, folder, save_plain, **kwargs)
        else:
            save_plain(str(folder), **kwargs)
        if model.image_processor is not None and kwargs.get("is_main_process", True):
            model.image_processor.save_pretrained(folder)


def _save_packed(
    model: PromptedSparseModel,
    folder: Path,
    save_plain: Callable[..., None],
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    check_prompt(model)
    names = ("max_shard_size", "variant", "save_original_format")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    # Everything but the weights; where this process is to write them, a file with one number stands for them.
    save_plain(str(folder), state_dict={"placeholder": torch.zeros(1)}, **kwargs)
    for placeholder in folder.glob("*.safetensors"):
        placeholder.unlink()
        state = model.state_dict() if state_dict is None else state_dict
        packed_shards.save_weights(folder, model, state, **options)


def load(
    model_class: type[PromptedSparseModel],
    name: str,
    load_plain: Callable[..., tuple[PromptedSparseModel, dict[str, Any]]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load a model from a folder or the Hub; see [`PromptedSparseModel.from_pretrained`].

    Args:
        model_class: class of the model.
        name: folder or Hub id.
        load_plain: `from_pretrained` of that class as transformers defines it.
        args: further positional arguments of `load_plain`.
        kwargs: further arguments of `load_plain`.
    """
    with hub.clear_errors(f"Could not load {name}", kwargs.get("revision")):
        kwargs["revision"] = hub.pinned_revision(name, kwargs)
        config_file = hub.find_file(name, CONFIG_NAME, kwargs)
        if "config" not in kwargs and config_file is None:
            place = "/".join(filter(None, (name, kwargs.get("subfolder"))))
            raise OSError(f"{place} holds no saved model: there is no {CONFIG_NAME} in it.")
        if config_file is not None:
            read_json(Path(config_file))  # refuses what transformers would stumble over
        with in_one_sentence(name):
            wants_info = kwargs.pop("output_loading_info", False)
            folder = Path(name, kwargs.get("subfolder") or "")
            if (current := current_folder(folder)) == folder:
                model, info = _load(model_class, name, load_plain, *args, **kwargs)
            else:
                model, info = _load(model_class, str(current), load_plain, *args, **kwargs | {"subfolder": ""})
            model.name_or_path = model.config.name_or_path = name
            return (model, info) if wants_info else model


def _load(
    model_class: type[PromptedSparseModel],
    name: str,
    load_plain: Callable[..., tuple[PromptedSparseModel, dict[str, Any]]],
    *args: Any,
    **kwargs: Any,
) -> tuple[PromptedSparseModel, dict[str, Any]]:
    files = packed_shards.find_packed_files(
        name, lambda file: hub.find_file(name, file, kwargs), kwargs.get("variant")
    )
    # Tensors of another shape are refused below, by one error for all that is wrong.
    kwargs |= {"ignore_mismatched_sizes": True, "use_safetensors": True}
    size = packed_shards.unpacked_size(lambda file: hub.find_file(name, file, kwargs), kwargs.get("variant"))
    with packed_shards.open_state_dict(files) as state_dict, no_larger_than(size):
        if files:
            config = kwargs.get("config") or model_class.config_class.from_pretrained(name, **hub.hub_kwargs(kwargs))
            kwargs |= {"config": config, "state_dict": state_dict}
        model, info = load_plain(None if files else name, *args, output_loading_info=True, **kwargs)
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
    check_prompt(model)
    if model.config.state == "frozen":
        remedy = f"{name} is damaged or was not saved by this library"
        check_zeros(model.prunable_weights(), model.masks(), remedy)
        check_pattern(model.masks(), model.pattern, remedy)
    model._mask_gradients()
    if model.config.state == "search":
        # As attaching scores leaves it.
        model.train_only(*SEARCH_ROLES)
    model.image_processor = load_image_processor(name, kwargs)
    if model.image_processor is not None:
        warn_of_other_images(name, model.image_processor, model.config)
    return model, info


def check_prompt(model: PromptedSparseModel) -> None:
    """Refuse NaN in the prompt and the label matrix.

    Raises:
        ValueError: there are some.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] in PROMPT_TENSORS}
    # Tensors that are offloaded to the disk lie on the meta device and have no values to check.
    if broken := [name for name, tensor in own.items() if not tensor.is_meta and tensor.isnan().any()]:
        raise ValueError(f"{broken[0]} of this model holds NaN; the run diverged, or its file is damaged.")


def short_card(model: PromptedSparseModel, title: str, tags: Sequence[str], metadata: Mapping[str, Any]) -> ModelCard:
    """Write a short model card; see [`PromptedSparseModel.short_card`]."""
    masks = model._measured_masks().values()
    kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    source = model.config.backbone_config.name_or_path
    return hub.short_card(
        title,
        tags,
        {"base_model": source if "/" in source else None, **metadata},
        backbone=type(model.backbone).__name__,
        labels=model.config.num_labels,
        state=model.config.state,
        pattern=model.config.pattern,
        kept=f"{kept / total:.2%}",
        kept_weights=f"{kept:,}",
        prunable_weights=f"{total:,}",
        has_prompt=model.prompt is not None,
    )
