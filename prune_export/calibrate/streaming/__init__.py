"""Runs a model one block at a time: what every calibration pass is made of."""
