"""Checkpoints: a lazy reader, a header-first writer, imports from GGUF, fp8, mxfp4 and the Hub."""

from prune_export.checkpoint.card import card_license
from prune_export.checkpoint.gguf import gguf_config, import_gguf
from prune_export.checkpoint.gguf_header import read_gguf_header
from prune_export.checkpoint.header import Entry
from prune_export.checkpoint.packed import Packed, import_packed, packed_in
from prune_export.checkpoint.reader import Checkpoint, all_finite
from prune_export.checkpoint.resolve import resolve_model
from prune_export.checkpoint.writer import Planned, write_checkpoint

__all__ = [
    "Checkpoint", "Entry", "Packed", "Planned", "all_finite", "card_license", "gguf_config",
    "import_gguf", "import_packed", "packed_in", "read_gguf_header", "resolve_model",
    "write_checkpoint",
]  # fmt: skip
