"""Check the fields of a `PromptedSparseConfig`, each alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..label_mapping import LABEL_MAPPINGS
from ..masking.channels import CHANNELS, UNITS
from ..masking.patterns import get_pattern
from ..masking.selection import SCOPES
from ..values import FLAG, NAMES, Check, are, check_values, count, is_count, is_number, one_of, optional, shortened
from .backbone_config import MAX_LABELS
from .prompts import PROMPTS

if TYPE_CHECKING:
    from .configuration import PromptedSparseConfig

STATES = ("dense", "search", "frozen")
LABEL_MAPPING_STATES = ("unset", "open", "final")
_MAX_SIDE, _MAX_CHANNELS = 2**14, 64
# Far above those of any image classifier.
_MAX_GROUPS, _MAX_WIDTH = 2**14, 2**20
_LARGEST, _SMALLEST_STD = 1e6, 1e-6


_SIDES = Check(
    f"(height, width), each from 1 to {_MAX_SIDE} pixels",
    lambda value: are(value, (2,), lambda side: is_count(side, 1, _MAX_SIDE)),
)
_CHANNELS = range(1, _MAX_CHANNELS + 1)
LABEL_COUNT = count(1, MAX_LABELS)


def _is_slices(value: Any) -> bool:
    """Return whether a value is a row of tensor, dimension, first index and indices a channel."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and isinstance(value[0], str)
        and is_count(value[1], 0, 1)
        and is_count(value[2], 0, _MAX_WIDTH)
        and is_count(value[3], 1, _MAX_WIDTH)
    )


def _is_group(value: Any) -> bool:
    """Return whether a value is a group of channels: their number, and rows of weights and of other tensors."""
    rows = range(_MAX_GROUPS)
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and is_count(value[0], 1, _MAX_WIDTH)
        and are(value[1], rows[1:], _is_slices)
        and are(value[2], rows, _is_slices)
    )


def _are_positions(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and is_count(number, 0) for name, number in value.items()
    )


FIELDS = {
    "state": one_of(STATES),
    "sparsity": Check("a fraction in [0, 1)", lambda value: is_number(value, 0, 1)),
    "scope": one_of(SCOPES),
    "pattern": Check("a name, such as '2:4'", lambda value: isinstance(value, str)),
    "channel_groups": optional(
        Check("a list of groups of channels", lambda value: are(value, range(1, _MAX_GROUPS), _is_group))
    ),
    "weight_positions": optional(Check("a count for each weight", _are_positions)),
    "channel_budget": one_of(UNITS),
    "channel_multiple": count(1, 1024),
    "signed_scores": FLAG,
    "ignore_modules": NAMES,
    "head_parameters": NAMES,
    "new_head": FLAG,
    "prompt": optional(one_of(PROMPTS)),
    # Each prompt has limits of its own, which depend on the image.
    "prompt_size": Check(f"a whole number up to {_MAX_SIDE}", lambda value: is_count(value, -_MAX_SIDE, _MAX_SIDE)),
    "prompt_inner_size": optional(_SIDES),
    "image_size": optional(_SIDES),
    "image_mean": optional(
        Check(
            "one finite number for each channel",
            lambda value: are(value, _CHANNELS, lambda mean: is_number(mean, -_LARGEST, _LARGEST)),
        )
    ),
    "image_std": optional(
        Check(
            f"one finite number of at least {_SMALLEST_STD} for each channel",
            lambda value: are(value, _CHANNELS, lambda std: is_number(std, _SMALLEST_STD, _LARGEST)),
        )
    ),
    "use_prompt": FLAG,
    "label_mapping": optional(one_of(LABEL_MAPPINGS)),
    "label_mapping_state": one_of(LABEL_MAPPING_STATES),
    "mapped_labels": optional(
        Check(
            "a list of the source class of each target class",
            lambda value: are(value, range(1, MAX_LABELS + 1), lambda label: is_count(label, 0, 2**20)),
        )
    ),
    "keep_source_head": FLAG,
}


def check_fields(config: PromptedSparseConfig) -> None:
    """Refuse the first field, in the order of the class, that has a value of the wrong kind.

    Raises:
        ValueError: what it is and what was expected, in one sentence.
    """
    check_values(vars(config), FIELDS)


def check_labels(labels: Any, count: Any) -> None:
    """Refuse label names that are not numbered from 0 on, and another `num_labels` than their count.

    Args:
        labels: `id2label` as passed or as read from a file, where numbers are text; None where it is not given.
        count: `num_labels` as passed, None where it is not given.

    Raises:
        ValueError: the reason in one sentence.
    """
    if count is not None and not LABEL_COUNT.accepts(count):
        raise ValueError(f"`num_labels` is {shortened(count)}; expected {LABEL_COUNT.expected}.")
    if labels is None:
        return
    if not isinstance(labels, Mapping) or not all(isinstance(name, str | int) for name in labels.values()):
        raise ValueError(f"`id2label` is {shortened(labels)}; expected the name of each class by its number.")
    if not 1 <= len(labels) <= MAX_LABELS or {str(number) for number in labels} != set(map(str, range(len(labels)))):
        raise ValueError(
            f"`id2label` numbers its {len(labels)} classes {shortened(list(labels))}; expected each number from 0 to "
            f"{len(labels) - 1} once."
        )
    if count is not None and count != len(labels):
        raise ValueError(f"`num_labels` is {count}, but `id2label` names {len(labels)} classes; pass one of them.")


def check_together(config: PromptedSparseConfig) -> None:
    """Refuse fields that contradict each other.

    Raises:
        ValueError: the reason in one sentence.
    """
    if config.sparsity == 1 and config.state != "frozen":
        raise ValueError("`sparsity` is 1, which leaves no weight; expected a fraction in [0, 1).")
    get_pattern(config.pattern).check(config.sparsity, config.scope)
    _check_channel_fields(config)
    if config.use_prompt and config.prompt is None:
        raise ValueError("`use_prompt` is True, but `prompt` is None; name a prompt, or set `use_prompt` to False.")
    _check_channels(config)
    _check_mapping(config)


def _check_channel_fields(config: PromptedSparseConfig) -> None:
    fields = (config.channel_groups, config.channel_budget, config.channel_multiple)
    if config.pattern != CHANNELS and fields != (None, CHANNELS, 1):
        raise ValueError(
            "`channel_groups`, `budget` and `channel_multiple` are of `pattern='channels'` alone, and the pattern is "
            f"{config.pattern!r}."
        )
    if config.pattern == CHANNELS and config.backbone_config is not None and config.channel_groups is None:
        raise ValueError("`channel_groups` is None; `from_backbone(..., pattern='channels')` finds the groups.")


def _check_channels(config: PromptedSparseConfig) -> None:
    mean, std = config.image_mean, config.image_std
    if mean is not None and std is not None and len(mean) != len(std):
        raise ValueError(f"`image_mean` has {len(mean)} values and `image_std` {len(std)}; expected one a channel.")
    if config.backbone_config is None or mean is None:
        return
    channels = config.backbone_config.to_dict().get("num_channels")
    if channels is not None and channels != len(mean):
        raise ValueError(f"`image_mean` has {len(mean)} values, and the backbone takes {channels} channels.")


def _check_mapping(config: PromptedSparseConfig) -> None:
    state, mapped = config.label_mapping_state, config.mapped_labels
    if config.label_mapping is None and (state != "unset" or mapped is not None):
        raise ValueError(
            f"`label_mapping_state` is {state!r} and `mapped_labels` {shortened(mapped)}, but `label_mapping` is "
            "None; name the label mapping."
        )
    one_to_one = config.label_mapping not in (None, "bayesian")
    if (mapped is not None) != (one_to_one and state != "unset"):
        raise ValueError(
            f"`mapped_labels` is {shortened(mapped)}; expected the source class of each target class where a "
            f"one-to-one mapping is set, else None: `label_mapping` is {config.label_mapping!r}, "
            f"`label_mapping_state` {state!r}."
        )
    if mapped is not None and len(mapped) != config.num_labels:
        raise ValueError(
            f"`mapped_labels` has {len(mapped)} entries; expected one for each of the {config.num_labels} classes."
        )
    if config.backbone_config is None:
        return
    sources = config.backbone_config.num_labels
    sliced = one_to_one and state == "final" and not config.keep_source_head
    if mapped is not None and not sliced and max(mapped) >= sources:
        raise ValueError(f"`mapped_labels` names class {max(mapped)}, and the head has {sources} classes.")
    if (sliced or config.label_mapping is None) and sources != config.num_labels:
        raise ValueError(
            f"The head has {sources} classes and `id2label` {config.num_labels}; expected the same number where no "
            "label mapping comes between them."
        )
