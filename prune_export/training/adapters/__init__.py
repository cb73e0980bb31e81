"""LoRA adapters: `targets` (which weights get one), `low_rank`, `masked`, and their `merge`."""
