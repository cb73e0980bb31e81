"""The exporter `ort_genai`: onnxruntime-genai's model builder."""

from prune_export.exporters.ort_genai.exporter import OrtGenai

__all__ = ["OrtGenai"]
