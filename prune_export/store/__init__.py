"""The content-addressed store of artifacts: what is there is complete, and work is done once.

An artifact's id is the hash of what made it: kind, version, parameters, input ids, data
fingerprint. It is built in `<id>.partial/` under a lock and renamed when its manifest is written,
so a killed build leaves only a partial directory, whose `scratch/` the next build goes on from.

    <store>/prune-angular_distance-1f0c…/manifest.json   kind, parameters, inputs, files and hashes
                                         files/          what the stage wrote
    <store>/<id>.partial/scratch/                        checkpoints of work that was not finished
    <store>/<id>.lock                                    held by the process that builds it
    <store>/roots/                                       which artifacts a result directory needs
    <store>/seen.json                                    hashes of files outside, by their stamps
    <store>/.prune-export-store                          the mark: without it, it is no store
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prune_export.errors import PlanError, StageError
from prune_export.store.mark import is_artifact, is_store, leave_mark, refuse_foreign_store
from prune_export.store.notes import manifest_of, root_of, seen_in, summed
from prune_export.store.placing import place
from prune_export.system.locking import held_if_free, locked, sweep_lock, write_atomically
from prune_export.system.platforms import sync_directory

__all__ = [
    "Artifact", "Key", "Store", "canonical_json", "locked", "place",
    "refuse_foreign_store", "sha256_of_file", "sha256_of_json",
]  # fmt: skip

_MANIFEST: Final = "manifest.json"
_SETTLED_NS: Final = 2_000_000_000
"""A file changed this short ago may change again within one tick of the file system's clock."""


@dataclass(frozen=True)
class Key:
    """Everything that an artifact depends on; `data` is the fingerprint of the data it used."""

    kind: str
    name: str
    version: str
    parameters: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    data: str | None = None

    @property
    def id(self) -> str:
        """`kind-name-` and 24 hexadecimal digits of the hash of everything in the key."""
        body = {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "parameters": self.parameters,
            "inputs": list(self.inputs),
            "data": self.data,
        }
        return f"{self.kind}-{self.name}-{sha256_of_json(body)[:24]}"


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its files lie in `path`, `record` is what its builder noted.

    `inputs` are those of its key, the ids of what it was made of among them.
    """

    id: str
    path: Path
    record: Mapping[str, Any]
    seconds: float
    files: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text.

    Raises:
        ValueError: NaN or infinity, which JSON cannot say.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_of_json(value: Any) -> str:
    """Hashes a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_file(file: Path) -> str:
    """Hashes a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """A directory of artifacts that several processes may use at once.

    It is made and marked where it is missing; with `make=False` it must be there.

    Raises:
        PlanError: it is another directory, or it is not there and cannot be made.
    """

    def __init__(self, root: Path, *, make: bool = True) -> None:
        refuse_foreign_store(root)
        if not make and not is_store(root):
            raise PlanError(str(root), "is no store: no run has used it", "give another `--store`")
        try:
            if make:
                root.mkdir(parents=True, exist_ok=True)
                leave_mark(root)
        except OSError as error:
            raise PlanError(
                str(root), f"cannot be made: {error.strerror}", "give another `--store`"
            ) from None
        self.root = root.resolve()

    def get(self, artifact_id: str) -> Artifact | None:
        """Looks up an artifact; None when it is absent or its files have changed.

        Files whose size, time and inode are as recorded are trusted; others are hashed again.
        """
        folder = self.root / artifact_id
        manifest = manifest_of(folder, _MANIFEST)
        if manifest is None or not self._intact(folder, manifest):
            return None
        return Artifact(
            artifact_id,
            folder / "files",
            manifest["record"],
            manifest["seconds"],
            {name: entry["sha256"] for name, entry in manifest["files"].items()},
            tuple(manifest.get("inputs", ())),
        )

    def make(
        self,
        key: Key,
        build: Callable[[Path, Path], Mapping[str, Any]],
        *,
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Artifact:
        """Builds the artifact of `key` by `build(files, scratch)`, unless it is there already.

        `build` returns a JSON record for the manifest. `waiting` is called once if another process
        is building the same artifact; this one then takes its result. With `force` what is there
        is built anew.
        """
        if not force and (found := self.get(key.id)) is not None:
            return found
        with locked(self.root / f"{key.id}.lock", waiting):
            if not force and (found := self.get(key.id)) is not None:
                return found
            return self._built(key, build)

    def remember(self, out: Path, ids: Collection[str]) -> None:
        """Notes that the result directory `out` needs these artifacts, so that `gc` keeps them."""
        roots = self.root / "roots"
        roots.mkdir(exist_ok=True)
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:24]
        write_atomically(
            roots / f"{name}.json", json.dumps({"out": str(out.resolve()), "ids": sorted(ids)})
        )

    def artifacts(self) -> Iterator[tuple[str, int, float, bool]]:
        """Lists the store: (id, bytes, time of last change, complete) of each artifact."""
        for folder in sorted(self.root.iterdir()):
            if not is_artifact(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            size = 0
            for place_, _, files in os.walk(folder):
                for file in files:
                    with contextlib.suppress(FileNotFoundError):  # one at work takes it away
                        size += Path(place_, file).lstat().st_size
            complete = manifest_of(folder, _MANIFEST) is not None
            with contextlib.suppress(FileNotFoundError):
                yield folder.name, size, folder.stat().st_mtime, complete

    def made(self, kind: str, folder: Path) -> bool:
        """Whether the files in `folder` are, byte for byte, those of an artifact of this kind here.

        Then they were made with this store, and not by a stranger.
        """
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*")
                 if file.is_file()}  # fmt: skip
        hashes: dict[str, str] = {}
        for manifest in sorted(self.root.glob(f"{kind}-*/{_MANIFEST}")):
            artifact = self.get(manifest.parent.name)
            if artifact is None or artifact.files.keys() != files.keys():
                continue
            hashes = hashes or {name: sha256_of_file(file) for name, file in files.items()}
            if artifact.files == hashes:
                return True
        return False

    def garbage(self) -> list[str]:
        """Lists artifacts and abandoned partial builds that no result directory needs, none in use.

        An artifact whose manifest cannot be believed is one of them, whoever needs it.
        """
        needed: set[str] = set()
        for note in (self.root / "roots").glob("*.json"):
            found = root_of(note)
            if found is not None and os.path.isdir(found[0]):
                needed |= found[1]
        return [
            name
            for name, _, _, complete in self.artifacts()
            if not (complete and name in needed) and not self._in_use(_id_of(name))
        ]

    def broken(self) -> list[str]:
        """Lists artifacts without a valid manifest, and notes that cannot be read."""
        notes = sorted((self.root / "roots").glob("*.json"))
        return [
            *(f"roots/{note.name}" for note in notes if root_of(note) is None),
            *(
                name
                for name, _, _, complete in self.artifacts()
                if not complete and not name.endswith(".partial") and not self._in_use(_id_of(name))
            ),
        ]

    def stray(self) -> list[str]:
        """Lists what killed runs left: lock files that nobody holds, and half-written files."""
        return list(self._stray())

    def remove(self, name: str) -> None:
        """Deletes an artifact or a partial build, or what is `broken` or `stray`."""
        folder = self.root / name
        if not is_artifact(name):
            if name.startswith("roots/") and not Path(name).name.startswith("."):
                folder.unlink(missing_ok=True)
            else:
                sweep_lock(folder)
            return
        with contextlib.suppress(OSError):
            (folder / _MANIFEST).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        sweep_lock(self.root / f"{_id_of(name)}.lock")

    def sweep(self) -> None:
        """Removes the locks and half-written files that killed runs have left."""
        for name in self.stray():
            self.remove(name)

    def file_hash(self, file: Path) -> str:
        """The sha256 of a file outside of the store, of its bytes: a name proves nothing.

        It is remembered by the file's size, times and inode.
        """
        real = Path(os.path.realpath(file))
        memory = self.root / "seen.json"
        stamp = _stamp_outside(real)
        known = seen_in(memory).get(str(real))
        if known is not None and known["stamp"] == stamp:
            return str(known["sha256"])
        digest = sha256_of_file(real)
        settled = time.time_ns() - max(stamp[1], stamp[3]) > _SETTLED_NS
        if settled and _stamp_outside(real) == stamp:
            # Read again: others may have written since.
            seen = seen_in(memory) | {str(real): {"stamp": stamp, "sha256": digest}}
            write_atomically(memory, json.dumps(seen))
        return digest

    def _stray(self) -> Iterator[str]:
        """Lock files that nobody holds and no build needs, and what killed writers left."""
        patterns = ("*.lock", ".*.json.[0-9]*", "roots/.*.json.[0-9]*", "*/.*.json.[0-9]*",
                    "..prune-export-store.[0-9]*")  # fmt: skip
        for file in sorted({file for pattern in patterns for file in self.root.glob(pattern)}):
            name = file.relative_to(self.root).as_posix()
            if name.endswith(".lock") and not is_artifact(name.removesuffix(".lock")):
                continue
            if file.is_symlink() or not stat.S_ISREG(file.lstat().st_mode):
                continue
            with held_if_free(file) as free:
                if free and file.exists():
                    yield name

    def _built(self, key: Key, build: Callable[[Path, Path], Mapping[str, Any]]) -> Artifact:
        partial = self.root / f"{key.id}.partial"
        files, scratch = partial / "files", partial / "scratch"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        began = time.monotonic()
        record = dict(build(files, scratch))
        seconds = time.monotonic() - began
        manifest = summed({
            "id": key.id,
            "kind": key.kind,
            "name": key.name,
            "version": key.version,
            "parameters": dict(key.parameters),
            "inputs": list(key.inputs),
            "data": key.data,
            "seconds": round(seconds, 3),
            "record": record,
            "files": {
                str(file.relative_to(files)): {
                    "sha256": sha256_of_file(file),
                    "stamp": _stamp(file),
                }
                for file in sorted(files.rglob("*"))
                if file.is_file()
            },
        })  # fmt: skip
        shutil.rmtree(scratch, ignore_errors=True)
        write_atomically(partial / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        final = self.root / key.id
        if final.exists():
            self._discard(final)
        partial.rename(final)
        sync_directory(self.root)
        found = self.get(key.id)
        if found is None:
            raise StageError(
                str(final),
                "changed while it was written",
                "is another program writing to the store?",
            )
        return found

    def _discard(self, folder: Path) -> None:
        """Moves a broken or forced-out artifact away in one step before it is deleted."""
        grave = folder.with_name(f"{folder.name}.old.partial")
        shutil.rmtree(grave, ignore_errors=True)
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def _intact(self, folder: Path, manifest: Mapping[str, Any]) -> bool:
        refreshed = False
        for name, entry in manifest["files"].items():
            file = folder / "files" / name
            try:
                stamp = _stamp(file)
                if stamp == entry["stamp"]:
                    continue
                if sha256_of_file(file) != entry["sha256"]:
                    return False
            except OSError:
                return False
            entry["stamp"], refreshed = stamp, True
        if refreshed:
            write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        return True

    def _in_use(self, artifact_id: str) -> bool:
        with held_if_free(self.root / f"{artifact_id}.lock") as free:
            return not free


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _stamp_outside(file: Path) -> list[int]:
    """As `_stamp`, and when anything about the file was last changed, which nobody can set."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def _id_of(name: str) -> str:
    return name.removesuffix(".partial").removesuffix(".old")
