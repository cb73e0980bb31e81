"""An OpenAI-compatible HTTP server over the engines of a result directory.

    prune-export serve out/ --port 8000

It imports `prune_export`, never the reverse; the command is found by its entry point.
"""

from __future__ import annotations

__all__: list[str] = []
