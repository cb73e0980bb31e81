"""Depth pruning: methods that remove whole blocks, or their attention or MLP."""
