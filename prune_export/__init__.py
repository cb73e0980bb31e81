"""Prune, heal, export and verify language models from a declarative recipe."""

from __future__ import annotations

__version__ = "0.1.0"
