"""The exporter `onnx`."""

from prune_export.exporters.onnx.exporter import Onnx

__all__ = ["Onnx"]
