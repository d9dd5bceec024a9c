"""Inference of models with channels removed: the dense model and one of half its multiply-accumulates, on the CPU.

    python benchmarks/channels.py [--models vit_small resnet50] [--batches 1 8] [--share 0.5] [--multiple 8] ...

Weights are random; every layer loses the same share of channels, heads included, and widths are multiples of
`--multiple`. Dense and cut models take turns in one process, in torch and in ONNX Runtime. A ratio is the time of the
dense model over that of the cut one in the same round: the median of the rounds, with their smallest and largest.
`MACs` is the ratio of the multiply-accumulates of linear and convolution layers; products of attention are not in it.
`--clock cpu` counts the seconds that the processor spent on this process; it is for one thread.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median

import torch
from common import machine, ratio_cells, table, time_in_turns, write_results
from inference import CLOCKS, MODELS, megabytes, onnx_session
from transformers import PreTrainedModel

from vpns_hf import PromptedSparseModel

COLUMNS = (
    *("model", "batch", "threads", "MACs", "MB", "MB cut"),
    *("torch ms", "cut ms", "torch / cut", "range", "ORT ms", "cut ms", "ORT / cut", "range"),
)


def frozen(backbone: PreTrainedModel, share: float, multiple: int) -> tuple[PromptedSparseModel, float]:
    """The model with a share of its multiply-accumulates cut out, and their number before over that after."""
    model = PromptedSparseModel.from_backbone(
        copy.deepcopy(backbone),
        pattern="channels",
        budget=f"macs:{share}",
        channel_multiple=multiple,
        scope="layer",
        prompt=None,
        image_size=224,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    whole = model.pattern.cost({group.name: group.size for group in model.pattern.groups})
    model.freeze_masks()
    if share:
        model.remove_channels()
    left = model.pattern.cost({group.name: group.size for group in model.pattern.groups})
    return model.eval(), whole / left


def row(name: str, build: Callable[[], PreTrainedModel], batch: int, args: argparse.Namespace) -> tuple[object, ...]:
    """Times and ratios of one model."""
    torch.manual_seed(0)
    backbone, images = build(), torch.randn(batch, 3, 224, 224)
    dense, _ = frozen(backbone, 0.0, 1)
    cut, fewer = frozen(backbone, args.share, args.multiple)
    sessions = [onnx_session(model, torch.get_num_threads()) for model in (dense, cut)]
    feed = {"pixel_values": images.numpy()}
    with torch.inference_mode():
        seconds = time_in_turns(
            {
                "torch": lambda: dense(images),
                "torch cut": lambda: cut(images),
                "ORT": lambda: sessions[0].run(None, feed),
                "ORT cut": lambda: sessions[1].run(None, feed),
            },
            args.repeats,
            CLOCKS[args.clock],
        )

    def cells(runtime: str) -> tuple[object, ...]:
        pair = seconds[runtime], seconds[f"{runtime} cut"]
        return (*(f"{1000 * median(samples):.1f}" for samples in pair), *ratio_cells(*pair))

    sizes = (f"{megabytes(copy.deepcopy(model).merge_and_unload()):.1f}" for model in (dense, cut))
    return (name, batch, torch.get_num_threads(), f"{fewer:.2f}", *sizes, *cells("torch"), *cells("ORT"))


def main() -> None:
    """Measure every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit_small", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("`--clock cpu` adds up the seconds of all threads; pass `--threads 1`.")
    rows: list[tuple[object, ...]] = []
    for name in args.models:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batches:
                rows.append(row(name, MODELS[name], batch, args))
                about = f"Machine: {machine()}. Clock: {args.clock}."
                write_results("channels", ["# Removed channels", (__doc__ or "").strip(), about, table(COLUMNS, rows)])


if __name__ == "__main__":
    main()
