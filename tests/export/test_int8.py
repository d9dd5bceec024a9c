"""Int8 ONNX files: close to the model, smaller, and static or dynamic."""

import logging

import numpy as np
import pytest
import torch
from helpers.models import tiny_model

from vpns_hf.export import export_onnx, quantize_onnx

pytest.importorskip("onnxruntime")
IMAGES = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize(("calibration", "kind"), [(None, "dynamic"), ([IMAGES[:8], IMAGES[8:]], "static")])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_logits_stay_close_and_weights_are_int8(family, calibration, kind, tmp_path):
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.freeze_masks()
    handlers = list(logging.getLogger().handlers)
    export_onnx(model, tmp_path / "model.onnx")
    assert quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", calibration) == kind
    assert logging.getLogger().handlers == handlers
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": IMAGES})
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES)).logits.numpy()
    error = np.sqrt(np.square(logits - expected).mean() / np.square(expected).mean())
    assert 0 < error < 0.15
    stored = onnx.load(tmp_path / "int8.onnx").graph.initializer
    quantised = [tensor for tensor in stored if tensor.data_type == onnx.TensorProto.INT8]
    entries = sum(int(np.prod(tensor.dims)) for tensor in quantised)
    assert entries >= sum(mask.numel() for mask in model.masks().values())
