"""The exporter `aoti`: PyTorch's ahead-of-time compiler (AOTInductor)."""

from prune_export.exporters.aoti.exporter import Aoti

__all__ = ["Aoti"]
