"""How many blocks or parts of blocks go, which, and what is written down of it."""
