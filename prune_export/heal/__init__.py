"""The healers, which train a pruned checkpoint; a file's name is the healer's name in a recipe.

`lora` and `qlora` share what the private modules hold: `_settings` (the keys), `_targets` (which
weights get an adapter), `_memory` (what it takes), `_model` (loading), `_loss`, `_train` (the
loop), `_state` (its checkpoints), `_zeros` and `_masked` (weights that stay zero), `_merge`, and
`_heal` (the whole, in order).
"""
