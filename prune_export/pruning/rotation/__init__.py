"""Rotating the residual stream (SliceGPT)."""
