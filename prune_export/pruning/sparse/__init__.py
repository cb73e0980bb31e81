"""Unstructured and N:M sparsity: masks, allocation over blocks, permutations, OBS."""
