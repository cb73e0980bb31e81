"""File locks that the kernel frees when their holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from filelock import lock_descriptor

from prune_export.system import platforms

_QUIETLY: Final = platforms.open_flags("O_NOFOLLOW", "O_CLOEXEC")


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the file at `path` against all other processes; it is gone afterwards.

    `waiting` is called once if another one holds it.
    """
    told = False
    while True:
        with _opened(path) as lock:
            if not lock_descriptor(lock.fileno(), blocking=told):
                waiting()
                told = True
                lock_descriptor(lock.fileno())
            # The holder before us may have removed the file: then nobody else would see ours.
            if not _still_there(path, lock):
                continue
            try:
                yield
            finally:
                unlink_held(path)
            return


@contextlib.contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Takes the lock at `path` if it is free, and says whether it was; the file stays."""
    try:
        # No wait for a writer, should it be a pipe, and no link: ours are neither.
        descriptor = os.open(path, os.O_RDONLY | _QUIETLY | platforms.open_flags("O_NONBLOCK"))
    except OSError:
        yield not path.is_symlink() and not path.exists()
        return
    with os.fdopen(descriptor) as lock:
        try:
            held = lock_descriptor(lock.fileno(), blocking=False)
        except OSError:
            held = False
        yield held and _still_there(path, lock)


def sweep_lock(path: Path) -> bool:
    """Removes a lock file that no living process holds; says whether it did."""
    with held_if_free(path) as free:
        if free and path.is_file():
            unlink_held(path)
            return not path.exists()
    return False


def write_atomically(file: Path, text: str) -> None:
    """Writes a text file atomically: readers see the old one or the new one, whole.

    A killed writer leaves `.NAME.PID` beside it, which `sweep_lock` tells from a living one's.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    while True:
        with _opened(temporary) as stream:
            lock_descriptor(stream.fileno())
            if not _still_there(temporary, stream):
                continue
            stream.truncate(0)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            if platforms.UNLINKS_OPEN_FILES:
                temporary.replace(file)
                return
        temporary.replace(file)
        return


def unlink_held(path: Path) -> None:
    """Removes a lock file that this process holds; it stays, empty, where open files must stay."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        if platforms.UNLINKS_OPEN_FILES:
            raise


def _opened(path: Path) -> IO[str]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _QUIETLY, 0o666)
    return os.fdopen(descriptor, "a", encoding="utf-8")


def _still_there(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.lstat())
    except FileNotFoundError:
        return False
