"""Latency-aware pruning: methods that narrow a model to a measured speed."""
