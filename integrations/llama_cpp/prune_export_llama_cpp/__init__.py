"""Writes a checkpoint as a GGUF file for llama.cpp: `prune-export gguf out/ --out model.gguf`."""
