"""Walks of calibration windows through a model, one block in memory."""
