"""The command `triton`."""

from __future__ import annotations

import dataclasses
import json as json_of
from pathlib import Path
from typing import Annotated

import typer


def triton(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A result directory or an exported engine.")
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="REPOSITORY", help="The model repository to add it to.")
    ],
    engine: Annotated[
        str | None,
        typer.Option(metavar="EXPORTER", help="ort_genai, onnx or tensorrt; the first there is."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's; the directory's unless given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a model repository for Triton Inference Server, and a compose file.

    prune-export triton out/ --to models/ --name small

    An engine of ort_genai generates text and streams it; those of onnx and tensorrt give logits,
    and Triton keeps their KV cache.
    """
    from prune_export.units import text_from_bytes
    from prune_export_triton.writing import write_repository

    found = write_repository(directory, to, engine=engine, name=name)
    if json:
        typer.echo(json_of.dumps(dataclasses.asdict(found), default=str))
        return
    typer.echo(f"{found.folder}: backend {found.backend}, {text_from_bytes(found.bytes)}")
