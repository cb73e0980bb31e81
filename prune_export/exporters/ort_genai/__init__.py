"""The exporter `ort_genai`."""

from prune_export.exporters.ort_genai.exporter import OrtGenai

__all__ = ["OrtGenai"]
