"""Activation statistics of a calibration pass; one file each."""
