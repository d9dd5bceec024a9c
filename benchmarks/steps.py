"""Time of a search step, a tuning step and inference against the same model trained and run densely.

    python benchmarks/steps.py [--models resnet18 vit_small vit_base] [--repeats 5] [--threads 2]

Every row takes turns with the dense model in one process; the median of the ratios is shown, with their smallest and
largest. *Dense* is a plain loop: forward, backward and AdamW over all weights. *Released way* restates what the
released code of VPNs pays for: a float mask is made from the scores in every layer's forward, and the threshold is the
k-th value over all scores, found anew after every step. Weights and images are random; the prompt is on in every other
step, as VPNs alternates.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ratio_cells, time_in_turns, write_table
from models import CLASSES, SPARSITY, VITS, resnet18, wrap
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from vpns_hf import PromptedSparseModel

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


def training_step(
    model: nn.Module, batch: dict[str, Tensor], after: Callable[[], Any] = lambda: None, prompts: bool = False
) -> Callable[[], None]:
    """A function that makes one optimizer step over what is trainable, and `after` it what the method needs."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    step = 0

    def run() -> None:
        nonlocal step
        extra = {"use_prompt": step % 2 == 0} if prompts else {}
        model(**batch, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        step += 1

    return run


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


def released_step(backbone: PreTrainedModel, batch: dict[str, Tensor], prompt: nn.Module) -> Callable[[], None]:
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
    return training_step(Prompted(), batch, find_threshold, prompts=True)


def training_rows(name: str, setting: Setting, repeats: int) -> list[tuple[str, ...]]:
    """The ratios of training steps of one model."""
    torch.manual_seed(0)
    batch = {
        "pixel_values": torch.randn(setting.batch_size, 3, 224, 224),
        "labels": torch.randint(CLASSES, (setting.batch_size,)),
    }
    backbone = setting.build().train()
    searched = wrap(copy.deepcopy(backbone)).train()
    tuned = wrap(copy.deepcopy(backbone)).train()
    tuned.freeze_masks()
    assert searched.prompt is not None
    steps = {
        "dense": training_step(copy.deepcopy(backbone), batch),
        "search": training_step(searched, batch, searched.update_masks, prompts=True),
        "released": released_step(copy.deepcopy(backbone), batch, copy.deepcopy(searched.prompt)),
        "tune": training_step(tuned, batch, tuned.zero_masked_weights, prompts=True),
    }
    seconds = time_in_turns(steps, repeats)
    what = f"{name}, batch {setting.batch_size}"
    return [
        ("search step / dense step", what, "1.02", *ratio_cells(seconds["search"], seconds["dense"])),
        ("search step / released way", what, "0.80", *ratio_cells(seconds["search"], seconds["released"])),
        ("released way / dense step", what, "", *ratio_cells(seconds["released"], seconds["dense"])),
        ("tuning step / dense step", what, "1.03", *ratio_cells(seconds["tune"], seconds["dense"])),
    ]


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            rows += training_rows(name, MODELS[name], args.repeats)
            rows += inference_rows(name, MODELS[name], args.repeats, Path(folder))
            write_table("steps", __doc__ or "", COLUMNS, rows)


if __name__ == "__main__":
    main()
