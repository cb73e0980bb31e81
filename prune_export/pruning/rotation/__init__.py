"""Bases of the residual states."""
