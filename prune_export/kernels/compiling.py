"""Compiles the kernel for packed weights with the C++ compiler that is there.

It is shipped as source: the instruction sets are chosen when it runs, so one library serves every
processor of an architecture. The same compiler makes the same bytes.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

from prune_export.errors import PlanError, StageError
from prune_export.system.temporary import Temporary

LIBRARY: Final = "libprune_export_packed.so"
"""The name of the library beside an engine."""

SOURCES: Final = ("packed.cpp", "packed_format.cpp", "packed_calls.cpp", "onnxruntime_operator.cpp")
_COMPILERS: Final = ("g++", "clang++", "c++")
_FLAGS: Final = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off",
    "-fno-exceptions", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL",
    "-Wl,--build-id=none", "-s", "-w",
)  # fmt: skip


def compiler() -> str | None:
    """The path of a C++ compiler; None where there is none."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def refuse_without_compiler(where: str) -> None:
    """Refuses, in the plan, a machine that cannot compile or load the kernel.

    Raises:
        PlanError: there is no C++ compiler, or the system is not Linux.
    """
    if platform.system() != "Linux":
        raise PlanError(
            where,
            f"the kernel for packed weights is written for Linux, and this is {platform.system()}",
            "leave `packed` out, or export on Linux",
        )
    if compiler() is None:
        raise PlanError(
            where,
            "compiles the kernel for packed weights, and no C++ compiler is on the PATH",
            "install g++ (Debian and Ubuntu: `apt install g++`), or leave `packed` out",
        )


def compile_library(out: Path) -> str:
    """Writes the library to the file `out`; gives the compiler's version, as it names itself.

    Raises:
        StageError: the compiler fails.
    """
    found = compiler()
    if found is None:
        raise StageError(str(out), "there is no C++ compiler on the PATH", "install g++")
    out.write_bytes(_compiled(found))
    return compiler_version(found)


@cache
def compiler_version(found: str) -> str:
    """The first line of what a compiler says of its version."""
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return (said.stdout.splitlines() or [""])[0]


@cache
def _compiled(found: str) -> bytes:
    """The library's bytes; compiled once in a process."""
    source = Path(__file__).parent
    with Temporary() as folder:
        made = folder / LIBRARY
        command = [found, *_FLAGS, "-o", str(made), *SOURCES]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StageError(
                f"{found} {' '.join(SOURCES)}",
                f"ended with {done.returncode}: {done.stderr.strip()[-600:]}",
                "install a compiler of C++17 (g++ 10 or later), or leave `packed` out",
            )
        return made.read_bytes()
