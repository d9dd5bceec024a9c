"""Check the fields of a `PromptedSparseConfig`, each alone and together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..label_mapping import LABEL_MAPPINGS
from ..masking.selection import SCOPES
from .backbone_config import MAX_LABELS
from .prompts import PROMPTS

if TYPE_CHECKING:
    from .configuration import PromptedSparseConfig

STATES = ("dense", "search", "frozen")
LABEL_MAPPING_STATES = ("unset", "open", "final")
_MAX_SIDE, _MAX_CHANNELS, _MAX_NAMES, _MAX_LENGTH = 2**14, 64, 10_000, 500
_LARGEST, _SMALLEST_STD = 1e6, 1e-6


class Check(NamedTuple):
    """Values that a field takes.

    Args:
        expected: the values in words, to follow "expected".
        accepts: whether a value is one of them.
    """

    expected: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any, least: float = -_LARGEST, most: float = _LARGEST) -> bool:
    # NaN compares with nothing; True would pass as 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_count(value: Any, most: int, least: int = 1) -> bool:
    return type(value) is int and least <= value <= most


def _are(value: Any, lengths: Sequence[int], accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(accepts, value))


def _one_of(values: Collection[str]) -> Check:
    return Check(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _optional(check: Check) -> Check:
    return Check(f"None or {check.expected}", lambda value: value is None or check.accepts(value))


def _names() -> Check:
    def is_name(value: Any) -> bool:
        return isinstance(value, str) and 0 < len(value) <= _MAX_LENGTH

    return Check("a list of names", lambda value: _are(value, range(_MAX_NAMES + 1), is_name))


_FLAG = Check("True or False", lambda value: type(value) is bool)
_SIDES = Check(
    f"(height, width), each from 1 to {_MAX_SIDE} pixels",
    lambda value: _are(value, (2,), lambda side: _is_count(side, _MAX_SIDE)),
)
_CHANNELS = range(1, _MAX_CHANNELS + 1)
FIELDS = {
    "state": _one_of(STATES),
    "sparsity": Check("a fraction in [0, 1)", lambda value: _is_number(value, 0, 1)),
    "scope": _one_of(SCOPES),
    "signed_scores": _FLAG,
    "ignore_modules": _names(),
    "head_parameters": _names(),
    "new_head": _FLAG,
    "prompt": _optional(_one_of(PROMPTS)),
    # Each prompt has limits of its own, which depend on the image.
    "prompt_size": Check(f"a whole number up to {_MAX_SIDE}", lambda value: _is_count(value, _MAX_SIDE, -_MAX_SIDE)),
    "prompt_inner_size": _optional(_SIDES),
    "image_size": _optional(_SIDES),
    "image_mean": _optional(
        Check("one finite number for each channel", lambda value: _are(value, _CHANNELS, _is_number))
    ),
    "image_std": _optional(
        Check(
            f"one finite number of at least {_SMALLEST_STD} for each channel",
            lambda value: _are(value, _CHANNELS, lambda std: _is_number(std, _SMALLEST_STD)),
        )
    ),
    "use_prompt": _FLAG,
    "label_mapping": _optional(_one_of(LABEL_MAPPINGS)),
    "label_mapping_state": _one_of(LABEL_MAPPING_STATES),
    "mapped_labels": _optional(
        Check(
            "a list of the source class of each target class",
            lambda value: _are(value, range(1, MAX_LABELS + 1), lambda label: _is_count(label, 2**20, 0)),
        )
    ),
    "keep_source_head": _FLAG,
}


def check_fields(config: PromptedSparseConfig) -> None:
    """Refuse the first field, in the order of the class, that has a value of the wrong kind.

    Raises:
        ValueError: what it is and what was expected, in one sentence.
    """
    for name, check in FIELDS.items():
        value = getattr(config, name)
        if not check.accepts(value):
            raise ValueError(f"`{name}` is {shortened(value)}; expected {check.expected}.")


def shortened(value: Any) -> str:
    """Shorten a value to at most one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def check_labels(labels: Any, count: Any) -> None:
    """Refuse label names that are not numbered from 0 on, and another `num_labels` than their count.

    Args:
        labels: `id2label` as passed or as read from a file, where numbers are text; None where it is not given.
        count: `num_labels` as passed, None where it is not given.

    Raises:
        ValueError: the reason in one sentence.
    """
    if count is not None and not _is_count(count, MAX_LABELS):
        raise ValueError(f"`num_labels` is {shortened(count)}; expected a whole number from 1 to {MAX_LABELS}.")
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
    if config.use_prompt and config.prompt is None:
        raise ValueError("`use_prompt` is True, but `prompt` is None; name a prompt, or set `use_prompt` to False.")
    _check_channels(config)
    _check_mapping(config)


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
