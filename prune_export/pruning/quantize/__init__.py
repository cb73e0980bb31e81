"""What quantization methods share: which matrices, the sweep of GPTQ, and the scales of groups."""
