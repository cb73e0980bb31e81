"""What a training makes small: `objective` (its keys), `loss` (of the next token), `divergence`,
`distill_loss` (from a teacher's distribution), `hidden` (its hidden states).
"""
