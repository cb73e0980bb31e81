"""Model directories: a lazy reader, a header-first writer, GGUF in."""

from prune_export.checkpoint.header import Entry
from prune_export.checkpoint.reader import Checkpoint
from prune_export.checkpoint.writer import Planned, write_checkpoint

__all__ = ["Checkpoint", "Entry", "Planned", "write_checkpoint"]
