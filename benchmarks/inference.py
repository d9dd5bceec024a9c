"""Inference of pruned models on the CPU: torch dense, ONNX Runtime dense, and `model.for_inference`.

    python benchmarks/inference.py [--models vit_small resnet50] [--sparsities 0.9 0.95 0.98] [--threads 1 2] ...

Weights are random and so are masks, of the same density in every layer. The three take turns in one process. A ratio
is the time of the dense model over that of the sparse one in the same round: the median of the rounds, with their
smallest and largest. Megabytes are those of all tensors; for the sparse model, of kept values and indices.

`--clock cpu` counts the seconds that the processor spent on this process, which on a busy machine leaves out the
waiting; it is for one thread.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from common import machine, ratio_cells, table, time_in_turns, write_results
from models import VITS, resnet50, wrap
from transformers import PreTrainedModel

from vpns_hf import PromptedSparseModel
from vpns_hf.export import export_onnx
from vpns_hf.inference import FastModel, median_milliseconds

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit_small": VITS["vit_small"],
    "vit_base": VITS["vit_base"],
    "resnet50": resnet50,
}
TARGETS = {
    ("vit", 1): {0.9: 1.8, 0.95: 2.7, 0.98: 3.5},
    ("vit", 2): {0.9: 1.5, 0.95: 2.0, 0.98: 2.4},
    ("resnet50", 1): {0.9: 1.5, 0.95: 1.8, 0.98: 2.2},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COLUMNS = (
    *("model", "batch", "threads", "sparsity", "torch ms", "ORT ms", "sparse ms"),
    *("torch / sparse", "range", "target", "ORT / sparse", "range", "layers sparse", "MB dense", "MB sparse"),
)


def pruned(backbone: PreTrainedModel, sparsity: float) -> PromptedSparseModel:
    """A frozen model with random masks."""
    model = wrap(copy.deepcopy(backbone))
    generator = torch.Generator().manual_seed(0)
    model.apply_masks(
        {name: torch.rand(mask.shape, generator=generator) >= sparsity for name, mask in model.masks().items()}
    )
    return model.eval()


def onnx_session(model: PromptedSparseModel, threads: int) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, dense."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "model.onnx")
        return onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )


def megabytes(module: torch.nn.Module) -> float:
    """Size of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]) / 1e6


def row(
    name: str,
    model: PromptedSparseModel,
    fast: FastModel,
    session: onnxruntime.InferenceSession,
    args: argparse.Namespace,
) -> tuple[object, ...]:
    """Times and ratios of one model at the present number of threads."""
    images = torch.randn(args.batch, 3, 224, 224)
    feed = {"pixel_values": images.numpy()}
    with torch.inference_mode():
        seconds = time_in_turns(
            {
                "torch": lambda: model(images),
                "ORT": lambda: session.run(None, feed),
                "sparse": lambda: fast(images),
            },
            args.repeats,
            CLOCKS[args.clock],
        )
    threads = torch.get_num_threads()
    sparsity = round(model.sparsity, 2)
    target = TARGETS.get((name.split("_")[0], threads), {}).get(sparsity, "") if args.batch == 1 else ""
    return (
        *(name, args.batch, threads, f"{sparsity:.0%}"),
        *(f"{1000 * median(seconds[runtime]):.1f}" for runtime in ("torch", "ORT", "sparse")),
        *ratio_cells(seconds["torch"], seconds["sparse"]),
        target,
        *ratio_cells(seconds["ORT"], seconds["sparse"]),
        f"{sum(layer.kernel != 'dense' for layer in fast.report.layers)} of {len(fast.report.layers)}",
        f"{megabytes(copy.deepcopy(model).merge_and_unload()):.1f}",
        f"{megabytes(fast):.1f}",
    )


def main() -> None:
    """Measure every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit_small", "resnet50"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != [1]:
        parser.error("`--clock cpu` adds up the seconds of all threads; pass `--threads 1`.")
    measure = functools.partial(median_milliseconds, clock=CLOCKS[args.clock])
    rows: list[tuple[object, ...]] = []
    for name in args.models:
        torch.manual_seed(0)
        backbone = MODELS[name]()
        for threads in args.threads:
            torch.set_num_threads(threads)
            session = onnx_session(pruned(backbone, 0.9), threads)
            for sparsity in args.sparsities:
                model = pruned(backbone, sparsity)
                fast = model.for_inference(torch.randn(args.batch, 3, 224, 224), measure=measure)
                rows.append(row(name, model, fast, session, args))
                about = f"Machine: {machine()}. Clock: {args.clock}."
                write_results("inference", ["# Inference", (__doc__ or "").strip(), about, table(COLUMNS, rows)])


if __name__ == "__main__":
    main()
