"""The exporter `aoti`."""

from prune_export.exporters.aoti.exporter import Aoti

__all__ = ["Aoti"]
