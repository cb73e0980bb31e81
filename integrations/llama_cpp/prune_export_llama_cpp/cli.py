"""The command `gguf`."""

from __future__ import annotations

import dataclasses
import enum
import json as json_of
from pathlib import Path
from typing import Annotated

import typer


class _Kind(enum.StrEnum):
    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"


def gguf(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="DIR", help="A result directory or a checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .gguf file.")],
    kind: Annotated[
        _Kind, typer.Option("--type", metavar="TYPE", help="Of matrices: f32, f16 or q8_0.")
    ] = _Kind.f16,
    keep_zeros: Annotated[
        bool,
        typer.Option("--keep-zeros", help="Keep heads and channels that are zero, too."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a checkpoint as GGUF, which llama.cpp runs: llama, mistral, qwen2, qwen3.

    prune-export gguf out/ --out model.gguf --type q8_0

    What is zero in single blocks is left out; such a file is of the architecture `deci`.
    """
    from prune_export.exporters.gguf.writing import write_gguf
    from prune_export.units import text_from_bytes

    found = write_gguf(checkpoint, out, kind.value, keep_zeros=keep_zeros)
    if json:
        typer.echo(json_of.dumps(dataclasses.asdict(found), default=str))
        return
    note = f"; {found.note}" if found.note else ""
    typer.echo(
        f"{found.file}: {found.architecture}, {found.tensors} tensors, "
        f"{text_from_bytes(found.bytes)}{note}"
    )
