"""Unstructured and N:M sparsity: methods that make single weights zero."""
