"""Parse the arguments of an experiment from a YAML file and command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..saved_files import MAX_YAML, read_text, read_yaml
from ..training.arguments import VPNsTrainingArguments
from . import machine
from .arguments import DataArguments
from .task_settings import apply_task_settings


class _Parser(HfArgumentParser):
    """Report a wrong flag as an exception, without the usage of some two hundred flags."""

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; `--help` lists all arguments.")


def parse_recipe(
    argument_classes: Sequence[type], arguments: Iterable[str] | None = None, default_config: Path | None = None
) -> tuple[Any, ...]:
    """Parse `[--config file.yaml] [--flag value]` into dataclasses.

    In the YAML file a string, also one in a list, that starts with `./` or `../` is a path relative to the file. Batch
    size and learning rates that neither the file nor a flag sets are those of the data set's row, see
    [`apply_task_settings`]; `auto` for the arguments `machine.NAMES` is the value that fits the machine, see
    [`machine.choose`].

    Args:
        argument_classes: dataclasses, whose fields are the valid keys and flags.
        arguments: the command line; None: `sys.argv[1:]`.
        default_config: the YAML file used when no `--config` is given.

    Returns:
        One instance of each class.

    Raises:
        ValueError: an unknown key or flag (names the nearest valid one), a required one that is missing, a value that
            does not fit, an unreadable file.
    """
    config, flags = _split_config(list(sys.argv[1:] if arguments is None else arguments), default_config)
    flags, automatic = machine.split_auto(flags)
    values: dict[str, Any] = {}
    if config is not None:
        values = _read_yaml(config)
        _check_names(values, argument_classes, f"{config}: unknown key")
    given = values | automatic | _given_flags(argument_classes, flags)
    chosen = machine.choose(given) if VPNsTrainingArguments in argument_classes else {}
    parser = _Parser(
        argument_classes, description="Flags win over the YAML file given by --config.", allow_abbrev=False
    )
    if not {"-h", "--help"} & set(flags):
        _check_required(parser, given)
    for action in parser._actions:
        action.required = False
    parser.set_defaults(**values | chosen)
    *parsed, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    _check_names([flag.lstrip("-") for flag in unknown], argument_classes, "unknown argument")
    data_args = next((each for each in parsed if isinstance(each, DataArguments)), None)
    args = next((each for each in parsed if isinstance(each, VPNsTrainingArguments)), None)
    if args is not None and args.process_index == 0 and chosen:
        print(machine.describe(chosen), flush=True)
    if data_args is not None and args is not None:
        apply_task_settings(data_args, args, given)
    return tuple(parsed)


def _split_config(arguments: list[str], default: Path | None) -> tuple[Path | None, list[str]]:
    """Split the flags into the YAML file and the rest."""
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=default, help="YAML file")
    known, flags = parser.parse_known_args(arguments)
    return known.config, flags


def _given_flags(argument_classes: Sequence[type], flags: Sequence[str]) -> dict[str, Any]:
    """Values of the arguments that are on the command line."""
    parser = _Parser(argument_classes, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_known_args(flags)[0])


def _check_required(parser: argparse.ArgumentParser, given: Collection[str]) -> None:
    missing = [f"`--{action.dest}`" for action in parser._actions if action.required and action.dest not in given]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given: as flags, or in a YAML file named by `--config`; `--help` lists "
            "all arguments."
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"The recipe {path} cannot be read; pass `--config` with the path of a YAML file.")
    content = read_yaml(path, read_text(path, MAX_YAML))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must hold `key: value` lines, one for each argument.")
    return {key: _resolve(value, path.parent) for key, value in content.items()}


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_resolve(entry, folder) for entry in value]
    is_relative = isinstance(value, str) and value.startswith(("./", "../"))
    return str((folder / value).resolve()) if is_relative else value


def _check_names(names: Iterable[str], argument_classes: Sequence[type], complaint: str) -> None:
    valid = [entry.name for cls in argument_classes for entry in dataclasses.fields(cls) if entry.init]
    for name in names:
        if name not in valid:
            nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; `--help` lists the valid ones."
            raise ValueError(f"{complaint} {name!r}{hint}")
