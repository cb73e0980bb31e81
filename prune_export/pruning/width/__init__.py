"""Units of width (channels, heads, experts): their scores, choice and edits."""
