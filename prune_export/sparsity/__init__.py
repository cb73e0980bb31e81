"""N:M sparsity: counts patterns in weights and graphs, and rewrites them for 2:4 hardware."""
