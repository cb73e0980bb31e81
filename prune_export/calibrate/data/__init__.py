"""Calibration and evaluation data: windows of tokens made from the texts that a recipe names."""
