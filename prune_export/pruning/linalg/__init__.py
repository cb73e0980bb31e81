"""Linear algebra on single matrices `[out, in]`."""
