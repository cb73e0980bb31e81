"""Checks where a command may write, so that it never overwrites what it did not write itself.

A result directory is absent, empty, or one whose every entry this tool wrote, by its own list: the
lock names each file of a result, and SHA256SUMS has their hashes, so that what somebody changed is
told from what was written (`written`). Anything else is refused before work begins, with what
stands there. What a killed run left is ours.

    out/.prune-export/          new/ and old/ while a result is swapped in; see `execution.result`
    out/.prune-export.lock      held by the run that does it
    .out.partial/  .out.lock    the same beside `out`, where it is not there yet
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from prune_export.errors import PlanError
from prune_export.system.written import (
    FIGURES,
    HELD,
    LOCK,
    SUMS,
    WORK,
    files_of,
    is_work,
    journal_of,
    journaled,
    listed,
    sha256_of,
)
from prune_export.units import MIB

_OF_THE_FILE_SYSTEM: Final = "lost+found"
"""What is in a file system of its own accord, where `out` is the root of one."""

_LARGE_BYTES: Final = 64 * MIB
_PATH_BYTES: Final = 3800
"""Linux takes 4,096; what a result holds needs the rest."""


def judged(
    out: Path, reads: Mapping[str, Path], *, option: str = "--out", again: bool = True
) -> Path:
    """Checks a result directory, and resolves its links; nothing is written.

    `reads` are the places that the work reads or keeps, by what they are called in an error: none
    may be `out` or lie in it, and `out` may not lie in the store. Without `again` not even a result
    of this tool may be there.

    Raises:
        PlanError: `out` is not absent, empty, or ours and unchanged; or it cannot be written to.
    """
    with judging(out, option) as (where, real):
        for name, path in reads.items():
            _refuse_nesting(where, real, name, path, option)
        refuse_strangers(real, where, option, again=again)
    return real


@contextmanager
def judging(place: Path, option: str) -> Iterator[tuple[str, Path]]:
    """How an error calls a directory that is to be written to, and its real place, links followed.

    It is absent or a directory, and may be written to; what the system says is told as an error.
    """
    where = f"{option} {_shown(str(place))}"
    try:
        real = Path(os.path.realpath(place))
        _refuse_odd(where, place, real, option)
        yield where, real
        _refuse_unwritable(where, real, option)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise _unusable(where, error, option) from None


def refuse_strangers(real: Path, where: str, option: str = "--out", *, again: bool = True) -> None:
    """Refuses a directory that holds what this tool did not write, or what was changed since.

    Without `again`, also what it did write.

    Raises:
        PlanError: naming it.
    """
    standing = real if real.is_dir() else _left_by_earlier(real)
    if standing is not None:
        listing = (listed(standing) if again else {}) | journaled(standing / WORK)
        foreign = list(_strangers(standing, listing))
        if journal_of(standing / WORK) is None:  # what came in as an earlier swap was going on
            old = standing / WORK / "old"
            foreign += [f"{WORK}/old/{name}" for name in files_of(old)]
        if foreign:
            raise PlanError(
                where,
                f"holds {named(foreign)}, not written by this tool"
                if again
                else f"is not empty: holds {named(foreign)}",
                f"give another `{option}`, or move that away; nothing was touched",
            )
        changed = list(_changed(standing, listing))
        if changed:
            raise PlanError(
                where,
                f"holds {named(changed)}, changed after this tool wrote it",
                f"give another `{option}`, or move it away: a run would write over it",
            )
    for beside, ours in ((partial_of(real), is_work), (lock_beside(real), is_lock)):
        if not real.is_dir() and os.path.lexists(beside) and not ours(beside):
            raise PlanError(
                where,
                f"is put together with {beside}, and something else stands there",
                "move it away; a killed run of an earlier version may have left it",
            )


def judged_picture(picture: Path, source: str, *, option: str = "--out") -> None:
    """Checks the path of a picture: free, or an earlier picture from `source`.

    Raises:
        PlanError: it is no .png, or something else stands there, or it cannot be written.
    """
    where = f"{option} {_shown(str(picture))}"
    try:
        folder = Path(os.path.realpath(picture.parent))
        if picture.suffix != ".png" or not folder.is_dir():
            raise PlanError(where, "is not a .png in a directory that exists",
                            f"write for example `{option} inspect.png`")  # fmt: skip
        status = _status(picture)
        if status is not None:
            ours = stat.S_ISREG(status.st_mode) and source.encode() in _head(picture)
            if not ours:
                raise PlanError(
                    where,
                    f"is there already: {_kind(status)} that {source} did not write",
                    f"give another `{option}`, or move it away; nothing was touched",
                )
        _refuse_unwritable(where, folder, option)
    except (OSError, ValueError) as error:
        raise _unusable(where, error, option) from None


def named(names: Sequence[str], shown: int = 3) -> str:
    """Words a list of names: the first few, and the number of the others."""
    first = [_shown(name) for name in names[:shown]]
    rest = len(names) - len(first)
    if rest:
        return f"{', '.join(first)} and {rest} other{'s' if rest > 1 else ''}"
    return " and ".join(filter(None, [", ".join(first[:-1]), first[-1]]))


def partial_of(out: Path) -> Path:
    """The directory in which a new result is put together."""
    return out.with_name(f".{out.name}.partial")


def _refuse_odd(where: str, place: Path, real: Path, option: str) -> None:
    """Refuses what is no directory, and names that no directory can have."""
    if len(os.fsencode(real)) > _PATH_BYTES:
        raise PlanError(where, f"is longer than {_PATH_BYTES} bytes", f"give a shorter `{option}`")
    status = _status(real)
    if status is None and place.is_symlink():
        raise PlanError(
            where,
            f"is a link to {real}, which is not there",
            f"make that directory, or give another `{option}`",
        )
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise PlanError(
            where, f"is {_kind(status)}, expected a directory", f"give another `{option}`"
        )
    if status is None and len(os.fsencode(real.name)) > 255 - len(os.fsencode("..partial")):
        raise PlanError(
            where,
            f"has a name of {len(os.fsencode(real.name))} bytes, expected at most 246",
            f"give a shorter `{option}`",
        )


def _refuse_nesting(where: str, real: Path, name: str, path: Path, option: str) -> None:
    other = Path(os.path.realpath(path))
    if _same(real, other):
        raise PlanError(where, f"is {name} itself ({other})", f"give another `{option}`")
    if any(_same(real, above) for above in other.parents):
        raise PlanError(where, f"holds {name} ({other})", f"give another `{option}`")
    if name == "the store" and any(_same(other, above) for above in real.parents):
        raise PlanError(
            where, f"lies in {name} ({other}), which `store gc` cleans", f"give another `{option}`"
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two places are one directory; it may be mounted in two places."""
    if one == other:
        return True
    first, second = _status(one), _status(other)
    return first is not None and second is not None and os.path.samestat(first, second)


def _refuse_unwritable(where: str, real: Path, option: str) -> None:
    existing = real
    while (status := _status(existing)) is None:
        existing = existing.parent
    if not stat.S_ISDIR(status.st_mode):
        problem = f"cannot be made: {existing} is {_kind(status)}, not a directory"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem = f"cannot be made: {existing} may not be written to"
    else:
        return
    raise PlanError(where, problem, f"give another `{option}`")


def _unusable(where: str, error: Exception, option: str) -> PlanError:
    """Makes the error for a place that the system refuses."""
    said = error.strerror if isinstance(error, OSError) else str(error)
    return PlanError(where, f"cannot be used: {said}", f"give another `{option}`")


def lock_beside(out: Path) -> Path:
    """The lock file of a run that makes a new result directory."""
    return out.with_name(f".{out.name}.lock")


def is_lock(file: Path) -> bool:
    """Whether a file is a lock file as we make them: empty."""
    status = _status(file)
    return status is not None and stat.S_ISREG(status.st_mode) and status.st_size == 0


def _strangers(folder: Path, listing: Mapping[str, Any], below: str = "") -> Iterator[str]:
    """Lists the files in a directory that are not in its list; a foreign directory by its name."""
    known = {name.removeprefix(below).split("/")[0] for name in listing if name.startswith(below)}
    with os.scandir(folder / below) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        name = below + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if not below and _is_ours_for_now(folder, entry):
            continue
        if is_folder and name == FIGURES and LOCK in listing and not os.listdir(entry):
            continue  # of a result without any
        if entry.name in known and is_folder and name not in listing:
            yield from _strangers(folder, listing, f"{name}/")
        elif not (name in listing and entry.is_file(follow_symlinks=False)):
            yield f"{name}/" if is_folder else name


def _is_ours_for_now(folder: Path, entry: os.DirEntry[str]) -> bool:
    if entry.name == WORK:
        return is_work(folder / WORK)
    if entry.name == HELD:
        return is_lock(folder / HELD)
    return entry.name == _OF_THE_FILE_SYSTEM and entry.is_dir(follow_symlinks=False)


def _changed(folder: Path, listing: Mapping[str, str | None]) -> Iterator[str]:
    """Lists the files whose bytes are not those that were written.

    Large ones are only hashed where they are younger than the list, which was written last.
    """
    last = _status(folder / SUMS) or _status(folder / LOCK)
    for name, digest in sorted(listing.items()):
        status = _status(folder / name)
        if digest is None or status is None:
            continue
        old = last is not None and status.st_mtime_ns < last.st_mtime_ns
        if status.st_size > _LARGE_BYTES and old:
            continue
        if sha256_of(folder / name) != digest:
            yield name


def _left_by_earlier(out: Path) -> Path | None:
    """The place where earlier versions kept the old result while they put in the new one."""
    old = out.with_name(f".{out.name}.old")
    return old if (old / LOCK).is_file() and not os.path.lexists(out) else None


def _shown(text: str, most: int = 200) -> str:
    """Formats a path for an error: shortened, and without control characters."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096)


def _status(path: Path) -> os.stat_result | None:
    """The status of `path`, without following a link; None where nothing is there."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(status: os.stat_result) -> str:
    kinds = {stat.S_ISDIR: "a directory", stat.S_ISREG: "a file", stat.S_ISLNK: "a link",
             stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
             stat.S_ISBLK: "a device"}  # fmt: skip
    return next((what for test, what in kinds.items() if test(status.st_mode)), "no directory")
