"""Export pruned models as plain transformers and timm folders and as ONNX, in float32 and int8."""

from .int8 import quantize_onnx
from .onnx import export_onnx
from .plain import export_plain, plain_model

__all__ = ["export_onnx", "export_plain", "plain_model", "quantize_onnx"]
