"""The healers, which train a pruned checkpoint; a file's name is the healer's name in a recipe.

A healer says what is trained: adapters (`lora`, `qlora`) or the weights themselves (`full`). What
for is a key of each, `objective` (`_objective`). They share what the private modules hold:
`_settings` (the keys), `_targets` (which weights get an adapter), `_memory` (what it takes),
`_model` and `_full` (loading), `_loss`, `_divergence` and `_distill_loss`, `_teacher`, `_train`
(the loop), `_state` (its checkpoints), `_zeros` and `_masked` (weights that stay zero), `_merge`,
and `_heal` (the whole, in order).
"""
