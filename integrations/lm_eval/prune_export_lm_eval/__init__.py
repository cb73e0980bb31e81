"""Every engine as a model of lm-evaluation-harness: `prune-export lm-eval out/ -t arc_easy`."""
