"""Edits of a model, and the only code that changes weights.

`edits` (what a method may ask for) and `rewriting` (a checkpoint, edited).
"""

from prune_export.surgery.edits import Become, Drop, Edit, Edits, Keep, Overwrite, Untie
from prune_export.surgery.rewriting import rewrite, write_text_alone

__all__ = [
    "Become",
    "Drop",
    "Edit",
    "Edits",
    "Keep",
    "Overwrite",
    "Untie",
    "rewrite",
    "write_text_alone",
]
