"""Healers train a pruned checkpoint; one file each, found by its name."""
