"""Model directories: a lazy reader, a header-first writer, GGUF and the Hub's models in."""

from prune_export.checkpoint.gguf import gguf_config, import_gguf
from prune_export.checkpoint.header import Entry
from prune_export.checkpoint.reader import Checkpoint
from prune_export.checkpoint.resolve import resolve_model
from prune_export.checkpoint.writer import Planned, write_checkpoint

__all__ = [
    "Checkpoint", "Entry", "Planned", "gguf_config", "import_gguf", "resolve_model",
    "write_checkpoint",
]  # fmt: skip
