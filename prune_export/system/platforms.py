"""What not every operating system has, each with what stands in for it.

Linux on x86-64 is tested. Elsewhere the package imports and plans: nothing but this module may name
what Windows or macOS lacks.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Final

UNLINKS_OPEN_FILES: Final = os.name != "nt"
"""Whether a file can be removed or renamed while it is open, as POSIX has it."""

_FICLONE: Final = 0x40049409

_position = threading.Lock()


def open_flags(*names: str) -> int:
    """Flags of `os.open`; one that the system does not know is left out. Never text mode."""
    flags = getattr(os, "O_BINARY", 0)
    for name in names:
        flags |= getattr(os, name, 0)
    return int(flags)


def usable_cores() -> int:
    """The cores that this process may run on; all of them where the system cannot say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def user_id() -> int:
    """The user whose files these are, as `st_uid` has it; 0 where every file says 0."""
    found = getattr(os, "geteuid", None)
    return int(found()) if found is not None else 0


def peak_ram(*, of_children: bool = False) -> int:
    """The most bytes that this process ever held, or its largest child; 0 where nobody can say."""
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:
        return 0
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return int(resource.getrusage(who).ru_maxrss * 1024)


def share_blocks(source: int, target: int) -> None:
    """Lets the file `target` have the blocks of the file `source`.

    Raises:
        OSError: this system or file system cannot.
    """
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:
        raise OSError("no blocks are shared on this system") from None
    fcntl.ioctl(target, _FICLONE, source)


def sync_directory(folder: Path) -> None:
    """Forces the names in a directory to the disk, where a directory can be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Reads into `view` from `offset` on; the number of bytes that came."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, len(view))
    view[: len(found)] = found
    return len(found)


def write_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Writes `view` at `offset`; the number of bytes that went."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)


def inherited(*descriptors: int) -> list[int]:
    """What a child process may be handed as `pass_fds`; nothing where that does not exist."""
    return list(descriptors) if os.name == "posix" else []


def suspend(process: subprocess.Popen[bytes]) -> None:
    """Stops a process until `resume`."""
    _signal(process, "SIGSTOP", "suspend")


def resume(process: subprocess.Popen[bytes]) -> None:
    """Lets a stopped process go on."""
    _signal(process, "SIGCONT", "resume")


def _signal(process: subprocess.Popen[bytes], name: str, verb: str) -> None:
    number = getattr(signal, name, None)
    if number is not None:
        process.send_signal(number)
    elif process.poll() is None:
        import psutil

        getattr(psutil.Process(process.pid), verb)()
