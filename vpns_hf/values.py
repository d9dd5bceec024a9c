"""Check values that users hand over: one rule a value, for flags, YAML, saved files and calls in Python alike."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")
# No count of steps, images or processes comes near it; random generators take seeds below it.
MAX_COUNT = 2**32 - 1


class Check(NamedTuple):
    """Values that an argument or a field takes.

    Args:
        expected: the values in words, to follow "expected".
        accepts: whether a value is one of them.
    """

    expected: str
    accepts: Callable[[Any], bool]


def require(name: str, value: Any, check: Check) -> None:
    """Refuse a value of the wrong kind.

    Raises:
        ValueError: what it is and what was expected, in one sentence.
    """
    if not check.accepts(value):
        raise ValueError(f"`{name}` is {shortened(value)}; expected {check.expected}.")


def checked(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a function, by name, before it runs; those that are left out are not checked.

    The function then raises a ValueError for the first that is of the wrong kind.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            for name, check in checks.items():
                if name in given:
                    require(name, given[name], check)
            return function(*args, **kwargs)

        return call

    return decorate


def shortened(value: Any) -> str:
    """Shorten a value to at most one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is a finite number in [`least`, `most`]."""
    # NaN compares with nothing, and True would pass as 1.
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and least <= value <= most and abs(value) < math.inf


def is_count(value: Any, least: int = 1, most: int = MAX_COUNT) -> bool:
    """Whether a value is a whole number from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def are(value: Any, lengths: Collection[int], accepts: Callable[[Any], bool]) -> bool:
    """Whether a value is a list or tuple of one of the lengths whose items are all accepted."""
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(accepts, value))


def number(expected: str, accepts: Callable[[float], bool]) -> Check:
    """Take finite numbers for which `accepts` is True."""
    return Check(expected, lambda value: is_number(value) and accepts(value))


def count(least: int = 1, most: int = MAX_COUNT) -> Check:
    """Take whole numbers from `least` to `most`."""
    return Check(f"a whole number from {least} to {most}", lambda value: is_count(value, least, most))


def one_of(values: Collection[str]) -> Check:
    """Take one of some names."""
    return Check(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def optional(check: Check) -> Check:
    """Take None or what another check takes."""
    return either(Check("None", lambda value: value is None), check)


def either(*checks: Check) -> Check:
    """Take what one of some checks takes."""
    words = " or ".join(dict.fromkeys(check.expected for check in checks))
    return Check(words, lambda value: any(check.accepts(value) for check in checks))


def list_of(check: Check, what: str, least: int = 0, most: int = 10_000) -> Check:
    """Take lists and tuples whose items a check takes, `what` in words."""
    return Check(f"a list of {what}", lambda value: are(value, range(least, most + 1), check.accepts))


def instance_of(*kinds: type) -> Check:
    """Take instances of some classes."""
    words = " or ".join(f"a {kind.__name__}" for kind in kinds)
    return Check(words, lambda value: isinstance(value, kinds))


FLAG = Check("True or False", lambda value: type(value) is bool)
TEXT = Check("text", lambda value: isinstance(value, str))
NAME = Check("a name", lambda value: isinstance(value, str) and 0 < len(value) <= 500)
NAMES = list_of(NAME, "names")
PATH = Check("a path", lambda value: isinstance(value, str | os.PathLike) and os.fspath(value) not in ("", b""))
NUMBER = Check("a finite number", is_number)
FRACTION = number("a fraction in [0, 1), such as 0.9 for 90 %", lambda value: 0 <= value < 1)
AT_LEAST_0 = number("a number of at least 0", lambda value: value >= 0)
ABOVE_0 = number("a number above 0", lambda value: value > 0)
BETWEEN_0_AND_1 = number("a share between 0 and 1, such as 0.1", lambda value: 0 < value < 1)
SHARE = number("a share above 0 and up to 1, such as 0.1", lambda value: 0 < value <= 1)
SEED = count(0)
FRACTIONS = Check(
    "a list of fractions in [0, 1), such as 0.9 for 90 %",
    lambda value: are(value, range(1, 1001), FRACTION.accepts) and len(set(value)) == len(value),
)
SEEDS = Check(
    f"a list of different whole numbers from 0 to {MAX_COUNT}",
    lambda value: are(value, range(1, 1001), SEED.accepts) and len(set(value)) == len(value),
)
_WHOLE = Check("a whole number", lambda value: is_count(value, -MAX_COUNT))
_KINDS = {bool: FLAG, int: _WHOLE, float: NUMBER, str: TEXT}


def of_type(hint: Any) -> Check:
    """Make the check of a field from its type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return Check("anything", lambda value: True)
    if hint in (None, NoneType):
        return Check("None", lambda value: value is None)
    if hint in _KINDS:
        return _KINDS[hint]
    if origin in (Union, UnionType):
        # None is named last, as in types.
        return either(*map(of_type, sorted(inner, key=lambda part: part is NoneType)))
    if origin is Literal:
        return Check(f"one of {', '.join(map(repr, inner))}", lambda value: value in inner)
    if origin is list:
        item = of_type(inner[0])
        return Check(f"a list, each item {item.expected}", lambda value: are(value, range(10_001), item.accepts))
    kind = origin or hint
    return Check(f"a {kind.__name__}", lambda value: isinstance(value, kind))


def check_values(values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Refuse the first value, in the order of the checks, that is of the wrong kind.

    Raises:
        ValueError: what it is and what was expected, in one sentence.
    """
    for name, check in checks.items():
        require(name, values[name], check)


def check_fields(instance: Any, checks: Mapping[str, Check]) -> None:
    """Refuse the first field of a dataclass that has a value of the wrong kind.

    Args:
        instance: the dataclass.
        checks: checks of its fields by name; a field that is not among them is checked by its type.

    Raises:
        ValueError: what it is and what was expected, in one sentence.
    """
    hints = get_type_hints(type(instance))
    by_type = {field.name: of_type(hints[field.name]) for field in dataclasses.fields(instance) if field.init}
    check_values(vars(instance), by_type | dict(checks))
