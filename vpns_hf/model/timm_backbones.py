"""Wrap timm models with the arguments that they were created with, and read the folders that timm writes."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

if TYPE_CHECKING:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification


def _factory_arguments() -> frozenset[str]:
    """Return the arguments of timm's factory itself: they open files or choose how to build."""
    # Loaded here, because timm takes longer to import than this package.
    from timm import create_model

    return frozenset(inspect.signature(create_model).parameters) - {"kwargs"}


def wrap_timm_model(model: nn.Module) -> TimmWrapperForImageClassification:
    """Wrap a timm model in transformers' class; the model itself becomes its `timm_model`.

    The configuration holds the arguments that the model was created with, where timm records them.

    Raises:
        ValueError: it is no timm model, has no head, or was created with arguments that JSON cannot hold.
    """
    try:
        timm_model: Any = model
        pretrained_cfg, num_classes = dict(timm_model.pretrained_cfg), int(timm_model.num_classes)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} is neither a transformers image classifier nor a timm model; wrap it as one of "
            "them."
        ) from None
    if not num_classes:
        raise ValueError(
            f"This {type(model).__name__} has no head (`num_classes=0`); create it with the number of classes."
        )
    arguments = _recorded_arguments(model)
    channels, *size = pretrained_cfg["input_size"]
    if side := arguments.get("img_size"):
        size = [side, side] if isinstance(side, int) else side
    pretrained_cfg["input_size"] = (arguments.get("in_chans", channels), *size)
    if pretrained_cfg["input_size"][0] != len(pretrained_cfg["mean"]):
        # Normalisation of the pretrained channels does not apply.
        del pretrained_cfg["mean"], pretrained_cfg["std"]
    config = transformers.TimmWrapperConfig.from_dict(
        {
            "architecture": pretrained_cfg["architecture"],
            "num_classes": num_classes,
            "pretrained_cfg": pretrained_cfg,
            "model_args": arguments or None,
        }
    )
    with torch.random.fork_rng(devices=[]):
        wrapper = transformers.TimmWrapperForImageClassification(config)
    wrapper.timm_model = model
    return wrapper


def _recorded_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` as they read after saving; empty where timm records none."""
    recorded = vars(model).get("_model_args", {})
    arguments = {}
    for name, value in recorded.items():
        if name == "num_classes" or name in _factory_arguments():
            continue
        try:
            arguments[name] = json.loads(json.dumps(value))
        except TypeError:
            raise ValueError(
                f"This {type(model).__name__} was created with {name}={value!r}, which config.json cannot hold; "
                f'create it with a name or a number instead, such as `act_layer="relu"`.'
            ) from None
    return arguments


def without_repeated_arguments(config: TimmWrapperConfig, name: str) -> TimmWrapperConfig:
    """Drop the number of classes from `model_args`, where timm writes it and transformers passes it a second time.

    Args:
        config: configuration of a folder that timm wrote; not modified.
        name: Hub id or folder, for the message.

    Raises:
        ValueError: an argument is one of timm's factory, such as `checkpoint_path`, which opens other files.
    """
    arguments = config.model_args or {}
    if foreign := sorted(_factory_arguments() & set(arguments)):
        raise ValueError(
            f"The config.json of {name} passes {foreign[0]!r} to `timm.create_model`, which describes no architecture "
            "and may open other files; remove it from `model_args`."
        )
    cleaned = {argument: value for argument, value in arguments.items() if argument != "num_classes"}
    return transformers.TimmWrapperConfig.from_dict(config.to_dict() | {"model_args": cleaned or None})
