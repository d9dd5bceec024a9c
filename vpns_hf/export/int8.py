"""Quantise an ONNX file to int8."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_QUANTISED = ("Conv", "Gemm", "MatMul")


def quantize_onnx(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    calibration: Iterable[NDArray[np.float32]] | None = None,
) -> str:
    """Quantise linear layers and convolutions of an ONNX file to int8 with onnxruntime's own tools.

    Weights are quantised by output channel, and zeros stay zeros. The range of activations is either fixed from a few
    dozen images (static) or found for each input (dynamic). Products of two activations, as in attention, stay in
    float32. Logits change: measure the accuracy.

    Args:
        source: file that [`export_onnx`] wrote.
        path: path of the quantised file, which is replaced if it exists.
        calibration: batches of normalised images [n, channels, height, width]; None: dynamic.

    Returns:
        `"static"` or `"dynamic"`.

    Raises:
        ImportError: the packages that ONNX needs are missing.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ImportError(f'ONNX needs more packages: `pip install "vpns-hf[onnx]"` ({error}).') from error
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        if calibration is None:
            quantize_dynamic(prepared, path, list(_QUANTISED), per_channel=True, weight_type=QuantType.QInt8)
            return "dynamic"
        quantize_static(
            prepared,
            path,
            _Images(calibration),
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            # Signed: unsigned activations overflow in the products of processors without VNNI.
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    return "static"


class _Images:
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, batches: Iterable[NDArray[np.float32]]):
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixel_values": batch}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime from setting up logging for the whole program, as its first message does."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
