"""Time of a search step, a tuning step and inference against the same model trained and run densely.

    python benchmarks/steps.py [--models resnet18 vit_small vit_base] [--repeats 6] [--threads 2]

Every row takes turns with the dense model in one process; the median of the ratios is shown, with their smallest and
largest. *Dense* is a plain loop: forward, backward and fused AdamW over all weights. *Released way* restates what the
released code of VPNs pays for: a float mask is made from the scores in every layer's forward, and the threshold is the
k-th value over all scores, found anew after every step. Weights and images are random; the prompt is on in every other
step, as VPNs alternates, and costs time itself, because its gradient goes back through the first layer: the row with
the prompt shows what is left to the masks.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, ratio_cells, table, time_in_turns, write_results
from models import CLASSES, SPARSITY, VITS, resnet18, wrap
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from vpns_hf import PromptedSparseModel

PARTS = ("forward", "backward", "optimizer", "masks")
COLUMNS = ("what", "on", "target", "median ratio", "range")


@dataclass(frozen=True)
class Setting:
    """A backbone with random weights and the batch that it trains on."""

    build: Callable[[], PreTrainedModel]
    batch_size: int


MODELS = {
    "resnet18": Setting(resnet18, 16),
    "vit_small": Setting(VITS["vit_small"], 16),
    "vit_base": Setting(VITS["vit_base"], 8),
}


class TrainingStep:
    """One optimizer step over what is trainable, and `after` it what the method needs; every part of it is timed."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        after: Callable[[], Any] = lambda: None,
        prompts: bool = False,
    ):
        self.model, self.batch, self.after, self.prompts = model, batch, after, prompts
        # Trainer's default.
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
        self.seconds: list[list[float]] = []

    def __call__(self) -> None:
        """Make one step."""
        extra = {"use_prompt": len(self.seconds) % 2 == 0} if self.prompts else {}
        times = [time.perf_counter()]
        loss = self.model(**self.batch, **extra).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        self.after()
        times.append(time.perf_counter())
        self.seconds.append([end - start for start, end in itertools.pairwise(times)])

    def median_parts(self) -> list[float]:
        """Median seconds of each of [`PARTS`], the first step left out."""
        return [statistics.median(part) for part in zip(*self.seconds[1:], strict=True)]


class _ScoresAsMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor) -> Tensor:
        return torch.where(scores <= threshold, torch.zeros_like(scores), torch.ones_like(scores))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ReleasedMask(nn.Module):
    """A weight times a float mask that is made in every forward, as the released code does it."""

    def __init__(self, weight: Tensor, threshold: Tensor):
        super().__init__()
        self.scores = nn.Parameter(weight.detach().clone())
        self.threshold = threshold

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        return weight * _ScoresAsMask.apply(self.scores.abs(), self.threshold)


def released_step(backbone: PreTrainedModel, batch: dict[str, Tensor], prompt: nn.Module) -> TrainingStep:
    """A search step as the released code makes it, with the same prompt."""
    backbone.requires_grad_(False)
    threshold = torch.zeros(())
    layers = [module for module in backbone.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    parts = []
    for layer in layers:
        parts.append(ReleasedMask(layer.weight, threshold))
        parametrize.register_parametrization(layer, "weight", parts[-1], unsafe=True)

    @torch.no_grad()
    def find_threshold() -> None:
        scores = torch.cat([part.scores.abs().flatten() for part in parts])
        threshold.copy_(scores.kthvalue(round(SPARSITY * scores.numel())).values)

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.prompt = backbone, prompt

        def forward(self, pixel_values: Tensor, labels: Tensor, use_prompt: bool) -> Any:
            pixel_values = self.prompt(pixel_values) if use_prompt else pixel_values
            return self.backbone(pixel_values=pixel_values, labels=labels)

    find_threshold()
    return TrainingStep(Prompted(), batch, find_threshold, prompts=True)


def training_rows(name: str, setting: Setting, repeats: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The ratios of training steps of one model, and where their time goes."""
    torch.manual_seed(0)
    batch = {
        "pixel_values": torch.randn(setting.batch_size, 3, 224, 224),
        "labels": torch.randint(CLASSES, (setting.batch_size,)),
    }
    backbone = setting.build().train()
    searched = wrap(copy.deepcopy(backbone)).train()
    tuned = wrap(copy.deepcopy(backbone)).train()
    tuned.freeze_masks()
    prompted = wrap(copy.deepcopy(backbone)).train()
    prompted.detach_scores()
    assert searched.prompt is not None
    steps = {
        "dense": TrainingStep(copy.deepcopy(backbone), batch),
        "dense, prompted": TrainingStep(prompted, batch, prompts=True),
        "search": TrainingStep(searched, batch, searched.update_masks, prompts=True),
        "released": released_step(copy.deepcopy(backbone), batch, copy.deepcopy(searched.prompt)),
        "tune": TrainingStep(tuned, batch, tuned.zero_masked_weights, prompts=True),
    }
    seconds = time_in_turns(steps, repeats)
    what = f"{name}, batch {setting.batch_size}"
    dense = sum(steps["dense"].median_parts())
    parts = [
        (step, what, *(f"{100 * part / dense:.1f}" for part in timed.median_parts())) for step, timed in steps.items()
    ]
    ratios = [
        ("search step / dense step", what, "1.02", *ratio_cells(seconds["search"], seconds["dense"])),
        (
            "search step / dense step with the prompt",
            what,
            "",
            *ratio_cells(seconds["search"], seconds["dense, prompted"]),
        ),
        ("search step / released way", what, "0.80", *ratio_cells(seconds["search"], seconds["released"])),
        ("released way / dense step", what, "", *ratio_cells(seconds["released"], seconds["dense"])),
        ("tuning step / dense step", what, "1.03", *ratio_cells(seconds["tune"], seconds["dense"])),
    ]
    return ratios, parts


def inference_rows(name: str, setting: Setting, repeats: int, folder: Path) -> list[tuple[str, ...]]:
    """The ratio of a loaded subnetwork's inference to the dense backbone's."""
    backbone = setting.build().eval()
    sparse = wrap(copy.deepcopy(backbone))
    sparse.freeze_masks()
    sparse.save_pretrained(folder / name)
    loaded = PromptedSparseModel.from_pretrained(folder / name).eval()
    rows = []
    for size in (1, 32):
        images = torch.randn(size, 3, 224, 224)
        with torch.inference_mode():
            seconds = time_in_turns({"dense": lambda: backbone(images), "loaded": lambda: loaded(images)}, 2 * repeats)  # noqa: B023
        rows.append(
            (
                "inference / dense inference",
                f"{name}, batch {size}",
                "1.01",
                *ratio_cells(seconds["loaded"], seconds["dense"]),
            )
        )
    return rows


def main() -> None:
    """Measure every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            ratios, shares = training_rows(name, MODELS[name], args.repeats)
            rows += ratios + inference_rows(name, MODELS[name], args.repeats, Path(folder))
            parts += shares
            write_results(
                "steps",
                [
                    "# Steps",
                    (__doc__ or "").strip(),
                    f"Machine: {machine()}.",
                    table(COLUMNS, rows),
                    "Where the time goes: medians, in percent of the dense step.",
                    table(("step", "on", *PARTS), parts),
                ],
            )


if __name__ == "__main__":
    main()
