"""Rotation: methods that rotate the residual stream before they narrow it."""
