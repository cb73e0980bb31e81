"""The exporter `tensorrt`."""

from prune_export.exporters.tensorrt.exporter import Tensorrt

__all__ = ["Tensorrt"]
