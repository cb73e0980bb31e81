"""Trains a pruned checkpoint; what the healers (`prune_export/heal/`) share.

`settings` and `objective` (the keys), `targets` (which weights get an adapter), `memory` (what it
takes), `model` and `full_weights` (loading), `loss`, `divergence` and `distill_loss`, `teacher`,
`loop` (the steps), `state` (its checkpoints), `zeros` and `masked` (weights that stay zero),
`merge`, and `heal` (the whole, in order).
"""
