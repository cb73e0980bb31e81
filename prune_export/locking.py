"""File locks that the kernel frees when their holder ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the file at `path` against all other processes; it is gone afterwards.

    `waiting` is called once if another one holds it.
    """
    told = False
    while True:
        with _opened(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if told else fcntl.LOCK_NB))
            except BlockingIOError:
                waiting()
                told = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            # The holder before us may have removed the file: then nobody else would see ours.
            if not _still_there(path, lock):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Takes the lock at `path` if it is free, and says whether it was; the file stays."""
    try:
        # No wait for a writer, should it be a pipe, and no link: ours are neither.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield not path.is_symlink() and not path.exists()
        return
    with os.fdopen(descriptor) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield _still_there(path, lock)


def sweep_lock(path: Path) -> bool:
    """Removes a lock file that no living process holds; says whether it did."""
    with held_if_free(path) as free:
        if free and path.is_file():
            path.unlink(missing_ok=True)
            return True
    return False


def write_atomically(file: Path, text: str) -> None:
    """Writes a text file atomically: readers see the old one or the new one, whole.

    A killed writer leaves `.NAME.PID` beside it, which `sweep_lock` tells from a living one's.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    while True:
        with _opened(temporary) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not _still_there(temporary, stream):
                continue
            stream.truncate(0)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(file)
            return


def _opened(path: Path) -> IO[str]:
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
    )
    return os.fdopen(descriptor, "a", encoding="utf-8")


def _still_there(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.lstat())
    except FileNotFoundError:
        return False
