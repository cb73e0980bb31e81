"""Temporary directories that are removed later if their process was killed.

Each has a lock file beside it, held as long as its owner lives. Who finds one whose lock is free
knows that the owner is dead, in whatever container it ran, and sweeps it.

    <temporary>/prune-export-k3jx9a/        session, offloaded weights, hidden states
    <temporary>/prune-export-k3jx9a.lock    held by its owner
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from filelock import lock_descriptor

from prune_export.system import platforms
from prune_export.system.locking import held_if_free, unlink_held

PREFIX: Final = "prune-export-"
_LOCK: Final = ".lock"


class Temporary:
    """A new directory in the system's temporary folder, removed when closed or collected.

    A child process that is given `descriptor` keeps it from being swept after its parent's death.
    """

    def __init__(self) -> None:
        self.descriptor, lock = _new_lock()
        self._end = weakref.finalize(self, _removed, os.getpid(), self.descriptor, lock)
        self.path = Path(lock.removesuffix(_LOCK))
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        """Removes the directory; more than once does no harm."""
        self._end()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *raised: object) -> None:
        self.close()


def temporary_place() -> Path:
    """The directory in which temporary directories are made."""
    return Path(tempfile.gettempdir())


def _new_lock() -> tuple[int, str]:
    while True:
        descriptor, lock = tempfile.mkstemp(prefix=PREFIX, suffix=_LOCK)
        lock_descriptor(descriptor)
        # A sweep that came between making and locking has removed it.
        if Path(lock).exists():
            return descriptor, lock
        os.close(descriptor)


def _removed(owner: int, descriptor: int, lock: str) -> None:
    if os.getpid() == owner:  # a forked child has the object, and neither directory nor lock
        shutil.rmtree(lock.removesuffix(_LOCK), ignore_errors=True)
        unlink_held(Path(lock))
    os.close(descriptor)


def sweep() -> list[Path]:
    """Removes the temporary directories whose owners are dead, and lists them."""
    swept: list[Path] = []
    with suppress(OSError):
        for lock in sorted(temporary_place().glob(f"{PREFIX}*{_LOCK}")):
            if not _ours(lock, stat.S_ISREG):
                continue
            with held_if_free(lock) as free:
                folder = lock.with_name(lock.name.removesuffix(_LOCK))
                if not free or not lock.exists():
                    continue
                if _ours(folder, stat.S_ISDIR):
                    shutil.rmtree(folder, ignore_errors=True)
                    swept.append(folder)
                unlink_held(lock)
    return swept


def _ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is this user's own and no link; the temporary folder is everybody's."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == platforms.user_id() and kind(status.st_mode)
