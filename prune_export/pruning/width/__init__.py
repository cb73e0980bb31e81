"""Structured pruning of channels, heads, hidden size and experts: scores, choice, refit, edits."""
