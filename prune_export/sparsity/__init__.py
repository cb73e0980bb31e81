"""N:M patterns: counted in weights and graphs, and rewritten for 2:4 hardware."""
