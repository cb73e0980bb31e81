"""A model repository for Triton Inference Server: `prune-export triton out/ --to models/`."""
