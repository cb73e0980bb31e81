"""The exporter `gptq_format`: codes in the safetensors layout of GPTQ."""

from prune_export.exporters.gptq_format.exporter import GptqFormat

__all__ = ["GptqFormat"]
