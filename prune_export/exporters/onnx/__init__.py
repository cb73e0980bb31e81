"""The exporter `onnx`: a portable ONNX graph with a KV cache."""

from prune_export.exporters.onnx.exporter import Onnx

__all__ = ["Onnx"]
