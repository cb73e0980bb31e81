"""Trains a pruned checkpoint; what the healers (`prune_export/heal/`) share.

`settings` (the keys), `adapters/` (LoRA: which weights, their products, their merge), `losses/`
(the next token's, and a teacher's), `memory` (what a training takes), `model` and `full_weights`
(loading), `attention`, `teacher`, `on_policy`, `layerdrop`, `zeros` (weights that stay zero),
`loop` (the steps), `shared` (by several processes), `state` (its checkpoints), and `heal` (the
whole, in order).
"""
