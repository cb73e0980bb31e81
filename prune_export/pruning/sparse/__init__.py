"""Masks: which weights become zero, in what order, and what makes up for them."""
