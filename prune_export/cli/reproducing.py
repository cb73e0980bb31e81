"""The command `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_export.cli import console, options
from prune_export.errors import VerifyError


def reproduce(
    target: Annotated[
        str,
        typer.Argument(metavar="RESULT", help="A result directory, or `owner/name` on the Hub."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Where it is made again, with a store."),
    ],
    model: options.Model = None,
    data_root: options.DataRoot = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    ignore_config_key: options.IgnoreKeys = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a result again from its lock and recipe, and compare: bytes, or quality where trained.

    prune-export reproduce out/ --model ./SmolLM2-135M --data-root corpus/ --out again/
    prune-export reproduce me/SmolLM2-135M-depth24 --out again/

    Speed is not measured. Exit status 1 when something came out otherwise.
    """
    from prune_export.execution import Options
    from prune_export.results.reproduction import places
    from prune_export.results.reproduction import reproduce as again

    chosen = places(
        out,
        Options(
            out=out,
            store=out,
            machine=options.machine(ram, threads, device),
            ignore_keys=tuple(ignore_config_key or ()),
            command=options.command_line(),
        ),
    )
    found = again(
        target, chosen, model=model, data_root=data_root,
        progress=console.progress(quiet=quiet or json),
    )  # fmt: skip
    if json:
        console.print_json(found.to_json())
    else:
        rows = [(one.what, "same" if one.same else "DIFFERS", one.said) for one in found.findings]
        console.table("", ["what", "", "compared"], rows, left=[0, 1, 2])
        for reason in found.reasons:
            console.output.put(f"may be why: {reason}")
    if not found.ok:
        differing = [one.what for one in found.findings if not one.same]
        raise VerifyError(
            target,
            f"came out otherwise: {', '.join(differing)}",
            f"what was made is in {chosen.out}; what may be why is said above",
        )
