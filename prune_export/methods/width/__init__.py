"""Structured pruning: methods that narrow MLPs, heads, the hidden size or experts."""
