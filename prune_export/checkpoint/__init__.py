"""Model directories: a lazy reader, a header-first writer, GGUF in."""

from prune_export.checkpoint.reader import Checkpoint, Entry

__all__ = ["Checkpoint", "Entry"]
