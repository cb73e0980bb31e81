"""Passes of the calibration windows through a model, with one block in memory at a time."""
