"""The options that several commands share, and the values made from them."""

from __future__ import annotations

import atexit
import os
import re
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from prune_export.errors import PlanError
from prune_export.machine import Machine, user_cache
from prune_export.system.processes import Team, joined, started_team
from prune_export.units import bytes_from_text

if TYPE_CHECKING:
    from prune_export import planning

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show tracebacks and the libraries' own logs.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="Hub id, directory or .gguf; replaces the recipe's."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override a key: `stages.0.prune.remove=6`. Repeatable.",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory below which the recipe's files lie; its own unless given."
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="FILE",
        help="Text to use for everything, split by documents; a file or a directory. Repeatable.",
    ),
]
Time = Annotated[
    str | None,
    typer.Option(
        "--time", metavar="TIME", help="Fit everything into this time: `30m`, `2h`, `1h30m`."
    ),
]
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", help="Where artifacts are kept (env PRUNE_EXPORT_STORE)."
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Memory that may be used: `16GiB`; what is free unless given."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Compute threads; every core unless given.")
]
TrustEngine = Annotated[
    bool,
    typer.Option(
        "--trust-engine",
        help="Open engines that hold machine code (TensorRT's) although the store did not make "
        "them: opening one runs it.",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="`cpu` or `cuda`; CUDA where there is one.")
]
IgnoreKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config-key",
        metavar="KEY",
        help="A config.json key that you know not to change the computation. Repeatable.",
    ),
]
Owners = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OWNER",
        help="Let a recipe of the Hub extend recipes of this owner too. Repeatable.",
    ),
]


def _use_families(given: list[Path] | None) -> list[Path] | None:
    from prune_export.arch import outside

    for one in given or ():
        outside.use(one)
    return given


Families = Annotated[
    list[Path] | None,
    typer.Option(
        "--families",
        metavar="DIR",
        help="A directory of tables of model families, `DIR/*.yaml` (env PRUNE_EXPORT_FAMILIES). "
        "Repeatable.",
        callback=_use_families,
    ),
]

Devices = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Plan for so many processes, a device each."),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Plan for GPUs that are not here, of this memory each: `80GiB`. Other memory is "
        "limited by `--ram` alone.",
    ),
]
DeviceTflops = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="N",
        help="What each of them does in training, sustained; 120 unless given.",
    ),
]

_STORE_VARIABLE: Final = "PRUNE_EXPORT_STORE"


def store_directory(given: Path | None) -> Path:
    """The store: as given, by the environment, or in the user's cache.

    Raises:
        PlanError: neither is given, and the user has no home directory.
    """
    if given is not None:
        return given
    named = os.environ.get(_STORE_VARIABLE)
    if named:
        return Path(named)
    try:
        return user_cache() / "store"
    except RuntimeError:
        raise PlanError(
            "--store",
            "is not given, and this user has no home directory to keep one in",
            f"pass `--store DIR`, or set {_STORE_VARIABLE} or XDG_CACHE_HOME",
        ) from None


def use_kept_families(store: Path) -> None:
    """Makes the tables known that were derived for this store."""
    from prune_export.arch import outside

    for folder in sorted(store.glob("family-*/files")):
        outside.use(folder)


def seconds(given: str | None) -> float | None:
    """Reads a time such as `90s`, `30m`, `2h` or `1h30m`.

    Raises:
        PlanError: it is none.
    """
    if given is None:
        return None
    found = re.fullmatch(
        r"(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?", given.replace(" ", "").lower()
    )
    parts = [int(part or 0) for part in found.groups()] if found else [0]
    total = sum(part * size for part, size in zip(parts, (3600, 60, 1), strict=False))
    if not total:
        raise PlanError(f"--time {given}", "is no time", "write for example `30m`, `2h` or `1h30m`")
    return float(total)


def machine(ram: str | None, threads: int | None, device: str | None) -> Machine:
    """This machine as the options limit it.

    Raises:
        PlanError: a size that is not one, a device that is not there.
    """
    if device not in (None, "cpu", "cuda"):
        raise PlanError("--device", f"got {device!r}", "write `cpu` or `cuda`")
    limit = size(ram, "--ram")
    found = Machine.detect(device=device, ram_bytes=limit, threads=threads)
    if device == "cuda" and found.device != "cuda":
        raise PlanError(
            "--device cuda",
            "no CUDA device is there, or torch is a build without CUDA",
            "pass `--device cpu`, or install torch for your CUDA version",
        )
    import torch

    torch.set_num_threads(found.threads)
    return found


def size(text: str | None, option: str) -> int | None:
    """The bytes that an option names.

    Raises:
        PlanError: it is no size.
    """
    try:
        return bytes_from_text(text) if text else None
    except ValueError as error:
        raise PlanError(option, str(error)) from None


def planned_devices(
    count: int, memory: str | None, tflops: float | None
) -> planning.Devices | None:
    """The devices that a plan is for; None is this machine.

    Raises:
        PlanError: what they do a second is given without their memory.
    """
    from prune_export import planning

    nbytes = size(memory, "--device-memory")
    if nbytes is None and tflops is not None:
        raise PlanError(
            "--device-tflops",
            "is for devices that are not here, whose memory is not given",
            "add `--device-memory 80GiB`, or leave it out: this machine is measured",
        )
    if nbytes is None and count == 1:
        return None
    here = count if nbytes is None else 1
    return planning.Devices(count, here, nbytes, 1e12 * (tflops or planning.TFLOPS))


def team() -> Team:
    """The processes that a launcher started with this one; does not return in those that follow.

    Raises:
        PlanError: the launcher asks for what is not there.
        Exit: this process followed, and is done.
    """
    stack = ExitStack()
    found = stack.enter_context(started_team())
    atexit.register(stack.close)
    if not found.leads:
        raise typer.Exit(joined(found))
    return found


def command_line() -> str:
    """The command that was typed, to be typed again."""
    return shlex.join(["prune-export", *sys.argv[1:]])
