"""The command `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from prune_export.cli import console, options
from prune_export.units import text_from_bytes

if TYPE_CHECKING:
    from prune_export.doctor import Diagnosis, Gpu


def doctor(store: options.StoreDir = None, json: options.Json = False) -> None:
    """Say what this machine can do, what is missing for what, and the command that adds it.

    prune-export doctor
    prune-export doctor --json

    Exit status 1 when a package is missing that nothing works without.
    """
    from prune_export.doctor import diagnose

    found = diagnose(options.store_directory(store))
    if json:
        console.print_json(found.to_json())
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    about = found.machine
    console.pairs([
        ("system", f"{about['system']}, Python {about['python']}, prune-export "
                   f"{about.get('prune-export', '(not installed)')}"),
        ("processor", f"{about['processor']}, {found.cores} cores"),
        ("instructions", ", ".join(found.cpu_features) or "not known"),
        ("memory", f"{text_from_bytes(found.available_bytes)} of "
                   f"{text_from_bytes(found.memory_bytes)} are free"),
        *(("GPU", _gpu_words(one)) for one in found.gpus),
        *(() if found.gpus else (("GPU", "none"),)),
        ("torch", f"{about.get('torch', '?')}, "
                  f"{'CUDA ' + found.torch_cuda if found.torch_cuda else 'without CUDA'}"),
        ("ONNX Runtime", ", ".join(found.providers) or "not installed"),
        ("devices here for", ", ".join(name for name, ok in found.exporters.items() if ok)),
        ("Hub", _hub_words(found)),
        *((f"disk, {one.what}", f"{text_from_bytes(one.free_bytes)} free at {one.path}")
          for one in found.disks),
    ])  # fmt: skip
    console.output.put()
    rows = [
        (one.name, "yes" if one.ok else "NO", one.purpose,
         ", ".join(f"{package.name} {package.version or '-'}" for package in one.packages))
        for one in found.extras
    ]  # fmt: skip
    console.table("", ["extra", "complete", "for", "packages"], rows, left=[0, 1, 2, 3])
    console.output.put()
    if not found.missing:
        console.output.put("nothing is missing")
    for one in found.missing:
        console.output.put(f"missing  {one.what}")
        console.output.put(f"         {one.why}")
        if one.command:
            console.output.put(f"         {one.command}")


def _gpu_words(one: Gpu) -> str:
    can = [
        name
        for name, there in (
            ("sparse tensor cores", one.sparse_tensor_cores),
            ("bf16", one.bfloat16),
            ("fp8", one.fp8),
        )
        if there
    ]
    return (
        f"{one.name}, compute capability {one.capability}, {text_from_bytes(one.free_bytes)} of "
        f"{text_from_bytes(one.memory_bytes)} free; {', '.join(can) or 'no sparse tensor cores'}"
    )


def _hub_words(found: Diagnosis) -> str:
    who = "logged in" if found.hub.logged_in else "not logged in (`hf auth login`, or HF_TOKEN)"
    return f"{who}, {'offline' if found.hub.offline else 'online'}, {found.hub.endpoint}"
