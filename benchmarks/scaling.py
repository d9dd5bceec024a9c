"""How the cost of masks grows with the number of weights, and one refresh of a mask against a k-th value.

    python benchmarks/scaling.py [--sizes vit_tiny vit_small vit_base vit_large] [--repeats 5] [--threads 2]

For ViTs of 5, 22, 86 and 303 million weights: attaching scores, one refresh of the mask from scores that have moved,
freezing, packing to a file and loading it; the smallest time of several. The exponent is the slope of log(seconds)
over log(weights): 1 is linear. The refresh takes turns with `torch.cat`, `abs` and `torch.kthvalue` over the same
scores; both give the same mask. Needs 12 GB of memory for the largest.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ratio_cells, time_in_turns, write_table
from models import VITS, wrap

from vpns_hf import PromptedSparseModel


def main() -> None:
    """Measure every size and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(VITS), default=list(VITS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    refreshes, costs, weights = [], [], []
    for size in args.sizes:
        model = wrap(VITS[size]())
        weights.append(sum(score.numel() for score in model.scores().values()))
        refreshes.append((size, f"{weights[-1]:,}", "0.15", *refresh_against_kth_value(model, args.repeats)))
        costs.append(seconds_of_every_part(model, args.repeats))
        write_table("refresh", __doc__ or "", ("scores of", "scores", "target", "median ratio", "range"), refreshes)
    rows = []
    for part in costs[0]:
        seconds = [cost[part] for cost in costs]
        exponent = np.polyfit(np.log(weights), np.log(seconds), 1)[0] if len(seconds) > 1 else math.nan
        rows.append((part, *(f"{value:.3f} s" for value in seconds), "1.05", f"{exponent:.2f}"))
    write_table("scaling", __doc__ or "", ("cost", *args.sizes, "target", "exponent"), rows)


@torch.no_grad()
def move(model: PromptedSparseModel) -> None:
    """Move the scores by about a step of Adam."""
    for score in model.scores().values():
        score.add_(torch.randn_like(score), alpha=1e-4)


def refresh_against_kth_value(model: PromptedSparseModel, repeats: int) -> tuple[str, str]:
    """Ratio of the seconds of the mask refresh to those of the k-th value, after checking that both agree."""
    scores = model.scores().values()
    threshold = torch.zeros(())
    kept = sum(int(mask.sum()) for mask in model.masks().values())

    @torch.no_grad()
    def kth_value() -> None:
        nonlocal threshold
        everything = torch.cat([score.abs().flatten() for score in scores])
        threshold = everything.kthvalue(everything.numel() - kept).values

    move(model)
    seconds = time_in_turns({"refresh": model.update_masks, "kth value": kth_value}, repeats)
    masks = model.masks().values()
    if not all((score.abs()[mask] >= threshold).all() for score, mask in zip(scores, masks, strict=True)):
        raise AssertionError("The refreshed mask keeps a score below the k-th value.")
    if sum(int(mask.sum()) for mask in masks) != kept:
        raise AssertionError("The refreshed mask keeps another number of weights.")
    return ratio_cells(seconds["refresh"], seconds["kth value"])


def seconds_of_every_part(model: PromptedSparseModel, repeats: int) -> dict[str, float]:
    """The smallest seconds of everything that walks all weights; leaves the model frozen."""
    seconds = {}

    def smallest(run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        found = []
        for _ in range(repeats):
            before()
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        return min(found)

    seconds["attach scores and select"] = smallest(model.attach_scores, model.detach_scores)
    seconds["refresh the mask"] = smallest(model.update_masks, lambda: move(model))
    masks = {name: mask.clone() for name, mask in model.masks().items()}
    model.freeze_masks()
    seconds["write zeros"] = smallest(model.zero_masked_weights)
    seconds["replace frozen masks"] = smallest(lambda: model.apply_masks(masks))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        seconds["save packed"] = smallest(lambda: model.save_pretrained(path))
        seconds["load packed"] = smallest(lambda: PromptedSparseModel.from_pretrained(path))
    return seconds


if __name__ == "__main__":
    main()
