"""The command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A result directory or a checkpoint.")
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="EXPORTER",
            help="Which engine to run: an exporter's name, or `pytorch`; the fastest kind that the "
            "directory holds unless given.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name; the directory's unless given."),
    ] = None,
    most_tokens: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="Prompt and answer together; less where the model takes less."
        ),
    ] = 4096,
    queue: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts that may wait; others get a 429.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds for a request, waiting included.")
    ] = 300.0,
    drain: Annotated[
        int,
        typer.Option(min=0, metavar="S", help="Seconds that running requests have at shutdown."),
    ] = 60,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compute threads of the engine.")
    ] = None,
    trust_engine: Annotated[
        bool,
        typer.Option("--trust-engine", help="Open an engine that holds a stranger's machine code."),
    ] = False,
) -> None:
    """Serve a result over HTTP as OpenAI's API: chat, completions, streaming, metrics.

    prune-export serve out/
    prune-export serve out/ --engine onnx --port 8001

    SIGTERM ends it after what is running and waiting has been answered.
    """
    from prune_export.errors import MissingExtra

    try:
        from prune_export_server.server import Settings, serve_forever
    except ImportError as error:
        package = str(error.name or "starlette").partition(".")[0]
        raise MissingExtra.of("serve", package, "server") from error
    serve_forever(
        Settings(
            directory,
            engine=engine,
            host=host,
            port=port,
            name=name,
            most_tokens=most_tokens,
            queue=queue,
            timeout=timeout,
            drain=drain,
            threads=threads,
            trust=trust_engine,
        )
    )
