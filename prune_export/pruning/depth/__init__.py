"""Removing blocks, or the attention or MLP of blocks: how many, which ones, and the edits."""
