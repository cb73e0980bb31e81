"""`python -m prune_export_server out/`: the command `serve` on its own."""

from __future__ import annotations

import typer

from prune_export_server.cli import serve

if __name__ == "__main__":
    typer.run(serve)
