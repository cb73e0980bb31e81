"""Prune, heal, export and verify language models from a declarative recipe."""

from __future__ import annotations

from prune_export.modeling import register_if_imported

__version__ = "0.1.0"

register_if_imported()
