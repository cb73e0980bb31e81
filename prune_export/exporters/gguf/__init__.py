"""The exporter `gguf`: a file that llama.cpp runs."""

from prune_export.exporters.gguf.exporter import Gguf

__all__ = ["Gguf"]
