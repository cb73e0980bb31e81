"""Choosing widths by the time that they take on an engine (ZipLM)."""
