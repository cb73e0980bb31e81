"""Widths by what they cost at run time."""
