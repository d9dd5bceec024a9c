"""Train on the data sets of `TRANSFER_TASKS` with the settings of the paper."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from ..data.tasks import TRANSFER_TASKS, PaperSettings
from ..training.arguments import VPNsTrainingArguments
from .arguments import DataArguments

logger = logging.getLogger(__name__)


def apply_task_settings(data_args: DataArguments, args: VPNsTrainingArguments, given: Collection[str]) -> None:
    """Set the paper's settings for a data set of `TRANSFER_TASKS`, wherever nothing else was asked for.

    These are batch size, optimizers and learning rates, and the metrics that the data set is measured by. A learning
    rate of the table belongs to its optimizer, so it is left alone where another optimizer was asked for; those of the
    search are left alone where the method finds the rate of its scores itself. The batch
    size of the table is that of an optimizer step: it is divided by processes and accumulation steps.

    Args:
        data_args: arguments that name the data set; one outside the table changes nothing, and a row without runs of
            the paper the metrics alone.
        args: arguments of training, changed in place.
        given: names of the arguments that were asked for, which stay as they are.

    Raises:
        ValueError: the batch size is no multiple of processes times accumulation steps.
    """
    task = TRANSFER_TASKS.get(data_args.dataset_name)
    if task is not None and "metrics" not in given:
        args.metrics = list(task.metrics[1:]) or None
    if task is None or task.paper is None:
        return
    taken = _optimizers(task.paper, args, given)
    if "per_device_train_batch_size" not in given:
        taken["per_device_train_batch_size"] = _batch_size(data_args.dataset_name, task.paper.batch_size, args)
    for name, value in taken.items():
        setattr(args, name, value)
    settings_taken = ", ".join(f"{name} {value}" for name, value in taken.items())
    logger.info("Settings of the paper for %s: %s.", data_args.dataset_name, settings_taken or "none")


def _optimizers(paper: PaperSettings, args: VPNsTrainingArguments, given: Collection[str]) -> dict[str, Any]:
    """Optimizers and learning rates of both stages, without those that were asked for otherwise."""
    taken: dict[str, Any] = {}
    # The paper's rate is for the sparsity that its searches start with.
    search = {} if args.pruning_method.finds_score_rate else paper.search_arguments()
    for settings in filter(None, (search, paper.tune_arguments())):
        optimizer = next(iter(settings))
        if optimizer not in given or getattr(args, optimizer) == settings[optimizer]:
            taken |= {name: value for name, value in settings.items() if name not in given}
    return taken


def _batch_size(dataset_name: str, total: int, args: VPNsTrainingArguments) -> int:
    """Images that a process takes at a time, for `total` in an optimizer step."""
    batches = args.gradient_accumulation_steps * args.world_size * max(1, args.n_gpu)
    if total % batches:
        raise ValueError(
            f"The batch size of {dataset_name} is {total}, which {batches} batches a step (accumulation steps x "
            "processes) cannot share out equally; set `per_device_train_batch_size`."
        )
    return total // batches
