"""Parse the arguments of an experiment from a YAML file and command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..data.tasks import TRANSFER_TASKS
from ..training.arguments import VPNsTrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which backbone is pruned, and how it is wrapped; see [`PromptedSparseModel.from_backbone`]."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id or local folder of an image classifier (transformers or timm)."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the backbone."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the one of `hf auth login` when not given."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are cached."})
    scope: str = field(default="global", metadata={"help": "What is ranked together: global, layer or erk."})
    prompt: str | None = field(
        default="pad", metadata={"help": "Visual prompt: pad, fixed, random, expand, stripe, lowrank, or none."}
    )
    prompt_size: int = field(default=16, metadata={"help": "Width of the prompt in pixels."})
    prompt_inner_size: int | None = field(
        default=None,
        metadata={"help": "Side to which prompted images are shrunk inside the prompt; overlaid when not given."},
    )
    label_mapping: str | None = field(
        default=None,
        metadata={
            "help": "Keep the pretrained head and map its classes: random, frequency, optimal, iterative or bayesian."
        },
    )
    keep_source_head: bool = field(
        default=False, metadata={"help": "With a label mapping, keep all source classes in the head."}
    )
    new_head: bool | None = field(
        default=None, metadata={"help": "Create the head anew; when not given, only if the label count differs."}
    )
    ignore_modules: list[str] = field(default_factory=list, metadata={"help": "Modules that are never pruned."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels; the backbone's own when not given."}
    )

    def __post_init__(self) -> None:
        if self.prompt in ("none", "None", ""):
            self.prompt = None


@dataclass
class DataArguments:
    """Which data set the subnetwork is for; see [`load_transfer_dataset`]."""

    dataset_name: str = field(
        metadata={
            "help": "A transfer task (cifar100, dtd, ...), a Hub id, or a local folder (image folders, parquet or "
            "arrow files)."
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images; found when not given."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels; found when not given."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split for every choice; carved from train when there is none."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split that is evaluated once, at the end."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of train that a carved validation split takes."}
    )
    split_seed: int = field(default=42, metadata={"help": "Seed of that carving; the same for every training seed."})
    shots: int | None = field(default=None, metadata={"help": "Training images of each class to keep; all if none."})
    fraction: float | None = field(
        default=None, metadata={"help": "Share of the training images to keep, stratified by class."}
    )
    corrupt_images: str = field(
        default="error",
        metadata={"help": "An image that cannot be read: error stops the run, skip leaves it out and says so."},
    )
    stream_images: int | None = field(
        default=None,
        metadata={"help": "Training images to fetch from a stream in place of the whole download; for short runs."},
    )
    check_duplicates: bool = field(
        default=False, metadata={"help": "Report images that are in more than one split before the run starts."}
    )
    augmentation: str = field(
        default="paper",
        metadata={"help": "Of plain training images: paper, randaugment, trivialaugment or none."},
    )
    cache_images: bool = field(
        default=False,
        metadata={"help": "Keep resized copies of training and validation images on disk, where loading is slow."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare data, resize copies and look for corrupt images."}
    )
    augment_prompted: bool = field(
        default=False, metadata={"help": "Augment prompted batches like plain ones (the released code does not)."}
    )


@dataclass
class DryRunArguments:
    """Base of what a recipe adds to the arguments of model, data and training."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Build model, data and arguments, print a summary, and stop before training."},
    )


def parse_recipe(
    argument_classes: Sequence[type], arguments: Iterable[str] | None = None, default_config: Path | None = None
) -> tuple[Any, ...]:
    """Read `[--config file.yaml] [--flag value]` into dataclasses.

    In the YAML file a string, also one in a list, that starts with `./` or `../` is a path relative to the file. Batch
    size and learning rates that neither the file nor a flag gives are those of the data set's row, see
    [`apply_task_settings`].

    Args:
        argument_classes: dataclasses, whose fields are the valid keys and flags.
        arguments: the command line; None: `sys.argv[1:]`.
        default_config: the YAML file used when no `--config` is given.

    Returns:
        One instance of each class.

    Raises:
        ValueError: an unknown key or flag (names the nearest valid one), a value that does not fit, an unreadable
            file.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    config = default_config
    if "--config" in rest:
        position = rest.index("--config")
        if position + 1 == len(rest):
            raise ValueError("`--config` needs the path of a YAML file.")
        config = Path(rest[position + 1])
        del rest[position : position + 2]
    parser = HfArgumentParser(argument_classes, description="Flags win over the YAML file given by --config.")
    if config is not None:
        values = _read_yaml(config)
        _check_names(values, argument_classes, f"{config}: unknown key")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    *parsed, unknown = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    _check_names([flag.lstrip("-") for flag in unknown], argument_classes, "unknown argument")
    data_args = next((each for each in parsed if isinstance(each, DataArguments)), None)
    args = next((each for each in parsed if isinstance(each, VPNsTrainingArguments)), None)
    if data_args is not None and args is not None:
        given = _given_flags(argument_classes, rest) | (set() if config is None else set(values))
        apply_task_settings(data_args, args, given)
    return tuple(parsed)


def _given_flags(argument_classes: Sequence[type], flags: Sequence[str]) -> set[str]:
    """The names of the arguments that are on the command line."""
    parser = HfArgumentParser(argument_classes)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(parser.parse_known_args(flags)[0]))


def apply_task_settings(data_args: DataArguments, args: VPNsTrainingArguments, given: Collection[str]) -> None:
    """Train on a data set of `TRANSFER_TASKS` as the paper did, wherever nothing else was asked for.

    Sets batch size, optimizers and learning rates in `args`, and the metrics that the data set is measured by. A
    learning rate of the table goes with its optimizer, so it is left alone where another optimizer was asked for. The
    batch size of the table is that of an optimizer step: every process gets its part of it for each accumulation step.

    Args:
        data_args: names the data set; other data sets than those of the table change nothing, and rows without
            runs of the paper the metrics alone.
        args: changed in place.
        given: names of the arguments that were asked for, which stay as they are.

    Raises:
        ValueError: the batch size cannot be shared out over processes and accumulation steps.
    """
    task = TRANSFER_TASKS.get(data_args.dataset_name)
    if task is not None and "metrics" not in given:
        args.metrics = list(task.metrics[1:]) or None
    if task is None or task.paper is None:
        return
    taken: dict[str, Any] = {}
    for settings in (task.paper.search_arguments(), task.paper.tune_arguments()):
        optimizer = next(iter(settings))
        if optimizer not in given or getattr(args, optimizer) == settings[optimizer]:
            taken |= {name: value for name, value in settings.items() if name not in given}
    if "per_device_train_batch_size" not in given:
        batches = args.gradient_accumulation_steps * args.world_size * max(1, args.n_gpu)
        if task.paper.batch_size % batches:
            raise ValueError(
                f"The batch size of {data_args.dataset_name} is {task.paper.batch_size}, which {batches} batches a "
                "step (accumulation steps x processes) cannot share out equally; set `per_device_train_batch_size`."
            )
        taken["per_device_train_batch_size"] = task.paper.batch_size // batches
    for name, value in taken.items():
        setattr(args, name, value)
    settings_taken = ", ".join(f"{name} {value}" for name, value in taken.items())
    logger.info("Settings of the paper for %s: %s.", data_args.dataset_name, settings_taken or "none")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"The recipe {path} cannot be read ({error.strerror}); pass `--config` with the path of a YAML file."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
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
