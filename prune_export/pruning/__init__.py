"""Algorithms that several pruning methods share, by family; no recipe names anything in here."""
