"""The healers, which train a pruned checkpoint; a file's name is the healer's name in a recipe.

A healer says what is trained: adapters (`lora`, `qlora`) or the weights themselves (`full`). What
for is a key of each, `objective`. What they share is in `prune_export/training/`.
"""
