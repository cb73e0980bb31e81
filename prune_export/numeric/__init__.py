"""Arithmetic on arrays that knows nothing of models: Cholesky factors, comparisons of logits."""
