"""Methods that narrow MLPs, heads, the hidden size or experts."""
