"""Table of runtimes: what each loads, which packages it needs, and how it runs a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.modeling import PromptedSparseModel
from .measured import INT8, REFERENCE, SPARSE

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Loaded:
    """Model that is ready to run.

    Args:
        run: computes logits [n, classes] of normalised images [n, channels, height, width], float32.
        note: how it runs, where that is not the same for all models.
    """

    run: Callable[[Images], Images]
    note: str | None = None


@dataclass(frozen=True)
class Runtime:
    """A way to run a model.

    Args:
        source: what it loads: `"folder"` that `save_pretrained` wrote, `"onnx"` file or `"int8"`, a quantised one.
        package: package that runs the model.
        needs: packages that must be installed.
        load: loads a source for images like the example, with a number of threads.
    """

    source: str
    package: str
    needs: tuple[str, ...]
    load: Callable[[Path, int, Images], Loaded]

    def missing(self) -> list[str]:
        """List the packages that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]


def _load_torch(source: Path, threads: int, example: Images) -> Loaded:
    torch.set_num_threads(threads)
    return Loaded(_run_torch(PromptedSparseModel.from_pretrained(source).float().eval()))


def _load_sparse(source: Path, threads: int, example: Images) -> Loaded:
    torch.set_num_threads(threads)
    fast = PromptedSparseModel.from_pretrained(source).float().for_inference(torch.from_numpy(example))
    layers = [layer.kernel != "dense" for layer in fast.report.layers]
    if fast.report.kept_dense:
        return Loaded(_run_torch(fast), f"every layer dense: {fast.report.kept_dense}")
    return Loaded(_run_torch(fast), f"{sum(layers)} of {len(layers)} layers sparse")


def _run_torch(model: torch.nn.Module) -> Callable[[Images], Images]:
    @torch.inference_mode()
    def run(images: Images) -> Images:
        return model(torch.from_numpy(images)).logits.numpy()

    return run


def _load_onnxruntime(source: Path, threads: int, example: Images) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would otherwise spin on the cores while another runtime has its turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return Loaded(lambda images: session.run(["logits"], {"pixel_values": images})[0])


def _load_openvino(source: Path, threads: int, example: Images) -> Loaded:
    import openvino

    # In float32 where the processor would rather compute in bfloat16.
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(source), "CPU", settings)
    return Loaded(lambda images: compiled([images])[0])


_EXPORT = ("onnxruntime", "onnxscript")

RUNTIMES: dict[str, Runtime] = {
    REFERENCE: Runtime("folder", "torch", (), _load_torch),
    SPARSE: Runtime("folder", "torch", (), _load_sparse),
    "onnxruntime": Runtime("onnx", "onnxruntime", _EXPORT, _load_onnxruntime),
    INT8: Runtime("int8", "onnxruntime", _EXPORT, _load_onnxruntime),
    "openvino": Runtime("onnx", "openvino", ("openvino", *_EXPORT), _load_openvino),
}
"""Runtimes by name. All but `"sparse"` compute with dense kernels, in which zeros take the time of other weights."""
