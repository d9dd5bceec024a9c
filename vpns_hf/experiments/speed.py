"""Measure in a few seconds how much smaller and faster pruning made a model on this machine."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping

import torch

from ..export.plain import sample_images
from ..inference import median_milliseconds, processor_name
from ..model.modeling import PromptedSparseModel
from ..report.tables import Result, file_size, milliseconds

logger = logging.getLogger(__name__)

DENSE = "dense"
# Seconds that the measurement may take, and what it takes for each model, in times of one image.
_LONGEST, _CALLS = 10.0, 30


def measure_milliseconds(models: Mapping[str, PromptedSparseModel]) -> dict[str, float]:
    """Time one image in pruned models of one architecture, each on the fastest kernels, and in dense kernels.

    They take turns, with the threads that torch uses. Dense kernels take the same time for dense and pruned weights.

    Args:
        models: pruned models by name; the last one is also timed in dense kernels.

    Returns:
        Median milliseconds by name, and that of dense kernels as `"dense"`; empty where there is nothing to measure:
        without frozen masks, on a GPU, for a model that takes most of a second, or where measuring fails, which a
        warning says.
    """
    if not models or any(each.config.state != "frozen" or each.device.type != "cpu" for each in models.values()):
        return {}
    try:
        return _measure(models)
    except Exception as error:
        # The run is done; its report does not depend on this.
        logger.warning("The speed of the model was not measured: %s", error)
        return {}


@torch.no_grad()
def _measure(models: Mapping[str, PromptedSparseModel]) -> dict[str, float]:
    *_, model = models.values()
    example, training = sample_images(model.config, count=1), model.training
    model.eval()
    try:
        model(example)
        start = time.perf_counter()
        model(example)
        if (time.perf_counter() - start) * _CALLS * len(models) > _LONGEST:
            return {}
        quick = functools.partial(median_milliseconds, rounds=3)
        fast = {name: each.for_inference(example, measure=quick) for name, each in models.items()}
        actions = {name: functools.partial(each, example) for name, each in {DENSE: model, **fast}.items()}
        return median_milliseconds(actions)
    finally:
        model.train(training)


def smaller_and_faster(result: Result, dense_bytes: int, dense_milliseconds: float | None) -> str:
    """Say in one line what pruning gave on this machine.

    Args:
        result: row of the pruned model.
        dense_bytes: size of the dense model's weights.
        dense_milliseconds: time of one image in dense kernels; None if it was not measured.
    """
    size, said = result.file_bytes or dense_bytes, []
    said.append(f"{dense_bytes / size:.1f} times smaller ({file_size(size)} for {file_size(dense_bytes)})")
    if dense_milliseconds is not None and result.milliseconds is not None:
        factor = dense_milliseconds / result.milliseconds
        times = f"({milliseconds(result.milliseconds)} ms for {milliseconds(dense_milliseconds)} ms an image"
        threads = torch.get_num_threads()
        where = f"batch 1, {threads} thread{'s' * (threads > 1)})"
        said.append(f"{f'{factor:.2f} times as fast' if factor > 1.02 else 'no faster'} {times}, {where}")
    return f"On this machine ({processor_name()}) the pruned model is {' and '.join(said)}."
