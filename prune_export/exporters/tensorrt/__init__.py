"""The exporter `tensorrt`: engines of TensorRT 10, TensorRT 11 and TensorRT-RTX."""

from prune_export.exporters.tensorrt.exporter import Tensorrt

__all__ = ["Tensorrt"]
