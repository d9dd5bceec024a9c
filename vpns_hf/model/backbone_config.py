"""Rebuild and check the configuration of a backbone, which may come from a stranger."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAX_LABELS = 100_000
# No width, depth, vocabulary or patch count of an image classifier comes near these.
_MAX_NUMBER, _MAX_LENGTH, _MAX_VALUES, _MAX_DEPTH = 2**20, 2000, 2**20, 16
# Arguments of `timm.create_model` that no constructor of a model takes.
_TIMM_FACTORY_ARGUMENTS = {"bn_eps", "bn_momentum", "bn_tf", "drop_connect_rate", "exportable", "scriptable"}
# Of constructors, but set by the wrapper, or no plain values.
_TIMM_OWN_ARGUMENTS = {"self", "num_classes", "device", "dtype", "hybrid_backbone", "stem_backbone"}


def rebuild_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the configuration of a backbone from the values in a file.

    Args:
        values: the `backbone_config` of a `config.json`.

    Raises:
        ValueError: an unknown model type, or values that no backbone has.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"The backbone has model type {model_type!r}, which this version of transformers does not know; "
            "install the version that the model was saved with."
        )
    check_backbone_values(values)
    try:
        # `AutoConfig.for_model(**values)` loses the label count of TimmWrapperConfig; only `from_dict` keeps it.
        return CONFIG_MAPPING[model_type].from_dict(dict(values))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`backbone_config` is no {model_type!r} configuration ({type(error).__name__}: {reason})."
        ) from error


def check_backbone(config: Any) -> None:
    """Refuse the configuration of a backbone that is no image classifier or that reads other files.

    Raises:
        ValueError: the reason in one sentence.
    """
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"`backbone_config` is {config!r}; expected the configuration of an image classifier.")
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"`backbone_config` is of model type {config.model_type!r}, and transformers has no image classifier of "
            "that type."
        )
    check_backbone_values(config.to_dict())


def check_backbone_values(values: Mapping[str, Any]) -> None:
    """Refuse numbers and texts that no image classifier has, before transformers builds labels or layers of them.

    Args:
        values: a configuration as a file holds it.

    Raises:
        ValueError: the reason in one sentence.
    """
    for count, (name, value) in enumerate(_leaves(values, 0), start=1):
        if count > _MAX_VALUES:
            raise ValueError(f"`backbone_config` holds more than {_MAX_VALUES} values.")
        if type(value) is int and abs(value) > (MAX_LABELS if name in ("num_labels", "num_classes") else _MAX_NUMBER):
            raise ValueError(f"`{name}` of the backbone is {value}, which is too large for an image classifier.")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"`{name}` of the backbone is {value}; expected a finite number.")
        if isinstance(value, str) and len(value) > _MAX_LENGTH:
            raise ValueError(f"`{name}` of the backbone has {len(value)} characters; expected at most {_MAX_LENGTH}.")
        if "attn_implementation" in name and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"`{name}` of the backbone is {value!r}, code of another repository; pass `attn_implementation` to "
                "`from_pretrained` if you trust it."
            )
    for name in ("id2label", "label_names"):
        labels = values.get(name)
        if isinstance(labels, Mapping | list) and len(labels) > MAX_LABELS:
            raise ValueError(f"`{name}` of the backbone names {len(labels)} labels; expected at most {MAX_LABELS}.")
    if values.get("model_type") == "timm_wrapper":
        _check_timm(values.get("architecture", ""), values.get("model_args"))


def _leaves(node: Mapping[str, Any] | list[Any], depth: int, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values of everything in a nested document but its branches."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"`backbone_config` is nested deeper than {_MAX_DEPTH} levels.")
    for key, value in node.items() if isinstance(node, Mapping) else ((name, value) for value in node):
        if isinstance(value, Mapping | list | tuple):
            yield from _leaves(value if isinstance(value, Mapping) else list(value), depth + 1, str(key))
        else:
            yield str(key), value


def _check_timm(architecture: Any, arguments: Any) -> None:
    if not isinstance(architecture, str) or set(architecture) & set(":/\\"):
        raise ValueError(
            f"`architecture` of the backbone is {architecture!r}; expected the name of a timm model, without a source "
            "such as `hf-hub:` or `local-dir:`, which would read other files."
        )
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"`model_args` of the backbone is {arguments!r}; expected a dictionary.")
    if refused := sorted(set(map(str, arguments or ())) - timm_arguments()):
        raise ValueError(
            f"`model_args` of the backbone holds {refused[0]!r}, which shapes no timm model; remove it, as with "
            f"`config.backbone_config.model_args.pop({refused[0]!r})`."
        )


@cache
def timm_arguments() -> frozenset[str]:
    """Names of the arguments that shape a timm model: those that the constructors of its image classifiers take.

    Arguments of `timm.create_model` itself, such as `checkpoint_path`, are not among them.
    """
    import timm.models

    modules = [module for name, module in sys.modules.items() if name.startswith(timm.models.__name__ + ".")]
    classes = {item for module in modules for item in vars(module).values() if isinstance(item, type)}
    signatures = [inspect.signature(item).parameters for item in classes if issubclass(item, nn.Module)]
    names = {name for parameters in signatures if "num_classes" in parameters for name in parameters}
    return frozenset((names | _TIMM_FACTORY_ARGUMENTS) - _TIMM_OWN_ARGUMENTS)
