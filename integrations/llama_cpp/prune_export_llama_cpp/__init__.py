"""Writes a checkpoint as a GGUF file for llama.cpp: `prune-export gguf out/ --out model.gguf`."""

from __future__ import annotations

from prune_export_llama_cpp.writing import Written, write_gguf

__all__ = ["Written", "write_gguf"]
