"""Content-addressed artifacts: present means complete, and the same work is done once.

An artifact's id is the hash of what made it: kind, version, parameters, input ids, data
fingerprint. It is built in `<id>.partial/` under a lock and renamed when its manifest is written,
so a killed build leaves only a partial directory, whose `scratch/` the next build goes on from.

    <store>/prune-angular_distance-1f0c…/manifest.json   kind, parameters, inputs, files and hashes
                                         files/          what the stage wrote
    <store>/<id>.partial/scratch/                        checkpoints of work that was not finished
    <store>/<id>.lock                                    held by the process that builds it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from prune_export.errors import PlanError, StageError

_MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class Key:
    """What makes an artifact what it is. `data` is the fingerprint of the data it saw."""

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
    """A complete artifact: its files lie in `path`, `record` is what its builder noted."""

    id: str
    path: Path
    record: Mapping[str, Any]
    seconds: float
    files: Mapping[str, str] = field(default_factory=dict)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text.

    Raises:
        ValueError: NaN or infinity, which JSON cannot say.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_of_json(value: Any) -> str:
    """The hash of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_file(file: Path) -> str:
    """The hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """A directory of artifacts that several processes may use at once.

    Raises:
        PlanError: it is not there and cannot be made.
    """

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanError(
                str(root), f"cannot be made: {error.strerror}", "give another `--store`"
            ) from None
        self.root = root.resolve()

    def get(self, artifact_id: str) -> Artifact | None:
        """The artifact, or None when it is absent or its files are no longer what was written.

        Files whose size, time and inode are as recorded are trusted; others are hashed again.
        """
        folder = self.root / artifact_id
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not self._intact(folder, manifest):
            return None
        return Artifact(
            artifact_id,
            folder / "files",
            manifest["record"],
            manifest["seconds"],
            {name: entry["sha256"] for name, entry in manifest["files"].items()},
        )

    def make(
        self,
        key: Key,
        build: Callable[[Path, Path], Mapping[str, Any]],
        *,
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Artifact:
        """The artifact of `key`, built by `build(files, scratch)` unless it is there already.

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
        _write_atomically(
            roots / f"{name}.json", json.dumps({"out": str(out.resolve()), "ids": sorted(ids)})
        )

    def artifacts(self) -> Iterator[tuple[str, int, float, bool]]:
        """(id, bytes, time of last change, complete) of everything in the store."""
        for folder in sorted(self.root.iterdir()):
            if folder.is_dir() and folder.name != "roots":
                files = [file for file in folder.rglob("*") if file.is_file()]
                size = sum(file.stat().st_size for file in files)
                complete = (folder / _MANIFEST).is_file() and not folder.name.endswith(".partial")
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
        """What no result directory needs: artifacts and abandoned partial builds, none in use."""
        needed: set[str] = set()
        for note in (self.root / "roots").glob("*.json"):
            entry = json.loads(note.read_text(encoding="utf-8"))
            if Path(entry["out"]).is_dir():
                needed |= set(entry["ids"])
        return [
            name
            for name, _, _, _ in self.artifacts()
            if name not in needed and not self._in_use(name.removesuffix(".partial"))
        ]

    def remove(self, name: str) -> None:
        """Deletes an artifact or a partial build."""
        folder = self.root / name
        with contextlib.suppress(FileNotFoundError):
            (folder / _MANIFEST).unlink()
        shutil.rmtree(folder, ignore_errors=True)
        (self.root / f"{name.removesuffix('.partial')}.lock").unlink(missing_ok=True)

    def file_hash(self, file: Path) -> str:
        """The sha256 of a file outside of the store, remembered by its size, time and inode.

        A file of the Hub's cache is named by its hash, which is then taken.
        """
        real = file.resolve()
        if real.parent.name == "blobs" and len(real.name) == 64:
            return real.name
        memory = self.root / "seen.json"
        try:
            seen: dict[str, Any] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            seen = {}
        stamp = _stamp(real)
        if seen.get(str(real), {}).get("stamp") != stamp:
            seen[str(real)] = {"stamp": stamp, "sha256": sha256_of_file(real)}
            _write_atomically(memory, json.dumps(seen))
        return str(seen[str(real)]["sha256"])

    def _built(self, key: Key, build: Callable[[Path, Path], Mapping[str, Any]]) -> Artifact:
        partial = self.root / f"{key.id}.partial"
        files, scratch = partial / "files", partial / "scratch"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir(parents=True)
        scratch.mkdir(exist_ok=True)
        began = time.monotonic()
        record = dict(build(files, scratch))
        seconds = time.monotonic() - began
        manifest = {
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
        }
        shutil.rmtree(scratch, ignore_errors=True)
        _write_atomically(partial / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        final = self.root / key.id
        if final.exists():
            self._discard(final)
        partial.rename(final)
        _sync_directory(self.root)
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
            _write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        return True

    def _in_use(self, artifact_id: str) -> bool:
        path = self.root / f"{artifact_id}.lock"
        try:
            with path.open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the file at `path` against all other processes; it is gone afterwards.

    `waiting` is called once if another one holds it.
    """
    told = False
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if told else fcntl.LOCK_NB))
            except BlockingIOError:
                waiting()
                told = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            # The holder before us may have removed the file: then nobody else would see ours.
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def place(source: Path, target: Path) -> None:
    """Copies a file, sharing its blocks where the file system can; never a hard link.

    So an edit of the copy never reaches the source.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        shutil.copyfile(source, target)


_FICLONE: Final = 0x40049409


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
