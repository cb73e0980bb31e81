"""Writes the result directory so that a killed run loses nothing.

Where `out` is not there yet, the result is put together beside it and renamed. Where it is, it may
be a mount point, somebody's current directory or what a link leads to, so it stays, and is filled
from within:

    out/.prune-export/README.txt    what this is
                      new/          the result that is being put together
                      swap.json     which files go out and which come in; the swap has begun
                      old/          what has gone out so far

Entries move one by one, config.json out first and in last, so that a half-filled directory is no
model. The journal says at any moment what is left to do: whoever comes next does it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import prune_export
from prune_export.errors import PlanError, StageError
from prune_export.store import Artifact, place
from prune_export.system.locking import locked, sweep_lock, write_atomically
from prune_export.system.places import is_lock, lock_beside, partial_of, refuse_strangers
from prune_export.system.written import (
    ABOUT,
    HELD,
    JOURNAL,
    LOCK,
    SUMS,
    WORK,
    files_of,
    is_work,
    journal_of,
    listed,
    sha256_of,
    sums_text,
)

_ABOUT: Final = """\
A run of prune-export puts its result together here, in new/. While swap.json is here, it is being
swapped in: what stood in its place goes to old/. If no run is at work, one was killed; the next
run with the same --out goes on with it, or clears it away. By hand: move back what is in old/.
"""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Locks a result directory against other runs, and waits for the lock.

    The same command given twice builds every artifact once, and both runs then come here.
    """
    with ExitStack() as stack:
        if not out.is_dir():
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock_beside(out)))
        # It may be there by now, and who comes later will look for the lock inside.
        if out.is_dir():
            stack.enter_context(locked(out / HELD))
        yield


def mend(out: Path) -> None:
    """Recovers from a killed run: finishes its swap, and removes its incomplete result."""
    left = (out / WORK, out / HELD, partial_of(out), lock_beside(out), _earlier(out))
    if not any(os.path.lexists(path) for path in left):
        return
    with alone(out):
        _mended(out)


class Result:
    """A result directory under construction; `finish` puts it in place. Call inside `alone`.

    With `again`, it takes the place of an earlier result.
    """

    def __init__(self, out: Path, *, again: bool = True) -> None:
        self.out, self._again = out, again
        _mended(out)
        self._within = out.is_dir()
        self._work = out / WORK if self._within else partial_of(out)
        self.partial = self._work / "new"
        self._hashes: dict[str, str] = {}
        self._work.mkdir(parents=True, exist_ok=True)
        (self._work / ABOUT).write_text(_ABOUT, encoding="utf-8")
        self.partial.mkdir()

    def add(self, artifact: Artifact, below: str = "") -> None:
        """Copies an artifact's files into the result."""
        for name, digest in artifact.files.items():
            place(artifact.path / name, self.partial / below / name)
            self._hashes[(Path(below) / name).as_posix()] = digest

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, keys in the order given."""
        text = json.dumps(value, indent=1, ensure_ascii=False)
        self.write_text(name, text + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file; bytes of file names that are no text stand in it as escapes."""
        (self.partial / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_lists(self, lock: Mapping[str, Any]) -> None:
        """Writes the lock, which names every file, and SHA256SUMS.

        The hashes of what was measured are not in the lock, which is the same for the same work.
        """
        _remove_empty(self.partial)
        names = sorted({*files_of(self.partial), LOCK, SUMS})
        self.write_json(LOCK, {**lock, "files": names})
        hashes = {
            name: self._hashes.get(name) or sha256_of(self.partial / name)
            for name in files_of(self.partial)
        }
        self.write_text(SUMS, sums_text(hashes))

    def finish(self) -> Path:
        """Puts the directory in place.

        Raises:
            StageError: something came in its way since the plan; what was there is left.
        """
        try:
            if self._within:
                refuse_strangers(self.out, str(self.out), again=self._again)
                names = {"old": sorted(_standing(self.out)), "new": list(files_of(self.partial))}
                write_atomically(self._work / JOURNAL, json.dumps(names))
            else:
                self.partial.rename(self.out)
        except PlanError as error:
            raise _in_the_way(self.out, self._work, error.problem) from None
        except OSError as error:
            raise _in_the_way(self.out, self._work, str(error)) from None
        if self._within:
            _swap(self.out)
        _clear(self._work)
        return self.out


def lock_of(
    base: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    artifacts: Mapping[str, Artifact],
    recipe_hash: str,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Makes the lock: what exactly was done, as ids and hashes; no times, paths or machine."""
    return {
        "lock": 1,
        "recipe_sha256": recipe_hash,
        "base": dict(base),
        "data": {name: dict(entry) for name, entry in sorted(data.items())},
        "artifacts": {
            name: {"id": artifact.id, "files": dict(sorted(artifact.files.items()))}
            for name, artifact in artifacts.items()
        },
        "versions": dict(versions),
    }


def _mended(out: Path) -> None:
    if is_lock(lock_beside(out)):
        sweep_lock(lock_beside(out))
    earlier = _earlier(out)
    if (earlier / LOCK).is_file() and not os.path.lexists(out):
        earlier.rename(out)
    if (out / WORK / JOURNAL).is_file():
        _swap(out)
    for work in (out / WORK, partial_of(out)):
        if is_work(work):
            _clear(work)


def _earlier(out: Path) -> Path:
    """The place where earlier versions kept the old result while they renamed the new one."""
    return out.with_name(f".{out.name}.old")


def _swap(out: Path) -> None:
    """Finishes the swap that the journal describes; may be called again after any interruption.

    Raises:
        StageError: something stands in the way; nothing is written over.
    """
    work = out / WORK
    journal = journal_of(work)
    if journal is None:
        raise StageError(str(work / JOURNAL), "cannot be read", f"move by hand what is in {work}")
    try:
        _move(out, work, journal)
    except OSError as error:
        raise _in_the_way(out, work, str(error)) from None
    _remove(work / "old", journal["old"])
    (work / JOURNAL).unlink()


def _move(out: Path, work: Path, journal: Mapping[str, Sequence[str]]) -> None:
    (work / "old").mkdir(exist_ok=True)
    new = _entries(journal["new"], last=True)
    if all(os.path.lexists(work / "new" / name) for name in new):  # none has come in yet
        for name in _entries(journal["old"], last=False):
            if os.path.lexists(out / name) and not os.path.lexists(work / "old" / name):
                (out / name).rename(work / "old" / name)
    for name in new:
        if not os.path.lexists(work / "new" / name):
            continue
        if os.path.lexists(out / name):
            raise FileExistsError(f"{out / name} stands in the way, and is not ours")
        (work / "new" / name).rename(out / name)


def _in_the_way(out: Path, work: Path, problem: str) -> StageError:
    return StageError(
        str(out),
        f"the result cannot be put there: {problem}",
        f"it is in {work / 'new'}, and what was moved away for it in {work / 'old'}: move them by "
        "hand, or mend that and give the same command again",
    )


def _entries(names: Iterable[str], *, last: bool) -> list[str]:
    """The top entries of `out` that hold the files; config.json comes first or last."""
    found = sorted({name.split("/")[0] for name in names})
    return sorted(found, key=lambda name: (name == "config.json") == last)


def _standing(out: Path) -> Iterator[str]:
    """The files that a new result replaces: those that the old one's lists name."""
    yield from (name for name in listed(out) if os.path.lexists(out / name))


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Removes these files and directories that are then empty; anything else stays."""
    real = os.path.realpath(folder)
    for name in names:
        file = folder / name
        above = os.path.realpath(file.parent)
        if above == real or above.startswith(real + os.sep):  # through no link
            file.unlink(missing_ok=True)
    _remove_empty(folder)
    with suppress(OSError):
        folder.rmdir()


def _remove_empty(folder: Path) -> None:
    """Removes the empty directories below a directory."""
    for inside, _, _ in os.walk(folder, topdown=False):
        if Path(inside) != folder:
            with suppress(OSError):
                Path(inside).rmdir()


def _clear(work: Path) -> None:
    """Removes an incomplete result; what had been moved away, if any is left, stays."""
    shutil.rmtree(work / "new", ignore_errors=True)
    for file in work.glob(f".{JOURNAL}.*"):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        if os.path.lexists(work / "old"):
            (work / "old").rmdir()
        (work / ABOUT).unlink(missing_ok=True)
        work.rmdir()


def versions() -> dict[str, str]:
    """The versions to write into the lock: this tool's."""
    return {"prune_export": prune_export.__version__}
