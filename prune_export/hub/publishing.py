"""Publishes a result directory on the Hub: our artifacts only, checked before a byte leaves.

What goes up is an allow-list, so a store, scratch files or an editor's leftovers never do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError, PublishError
from prune_export.hub.credentials import refuse_secrets
from prune_export.hub.materials import BILL, write_bill
from prune_export.hub.signing import SIGNATURE, sign
from prune_export.hub.uploading import check_names, check_online, found_token, upload
from prune_export.modeling import FOLDER
from prune_export.progress import Progress, Silent
from prune_export.system.files import (
    CARD_BYTES,
    REPORT_BYTES,
    open_regular,
    read_json_object,
    read_regular,
)
from prune_export.units import text_from_bytes
from prune_export.verify.results import Verification

FILE_LIMIT_BYTES: Final = 50_000_000_000
"""The Hub's documented limit for one file; transformers shards below it."""

_CODE: Final = ("configuration_sliced.py", "modeling_sliced.py")
_OURS: Final = (
    "README.md", "prune_recipe.yaml", "prune_recipe.lock.json", "report.json", "report.html",
    "verify.json", "model.safetensors.index.json", "config.json", "figures/*.png",
    "quantization.grid", ".eval_results/*.yaml",
    *_CODE,
)  # fmt: skip
_ENGINE: Final = (
    "config.json", "genai_config.json", "*.onnx", "*.onnx_data", "*.onnx.data", "*.gguf",
    "build.log", "layers.json",
)  # fmt: skip
_BOUND: Final = ("*.plan", "*.engine", "*.trt")
"""Engines that only the machine which built them can run, and that may carry host code."""

_UNVERIFIED: Final = "mend the recipe and run it again, or publish with force"
_WHOLE: Final = "publish the whole `out/` directory of a run"


@dataclass(frozen=True)
class Published:
    """What was uploaded, or would be: `commit` and `url` are empty after a dry run."""

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        done = f"published {self.url}" if self.commit else f"would publish to {self.repo_id}"
        lines = [f"{done}: {len(self.files)} files, {text_from_bytes(self.bytes)}", *self.files]
        lines += [f"{name} (left out)" for name in self.left_out]
        return "\n  ".join(lines)


def publish(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    engines: bool = False,
    allow: Sequence[str] = (),
    bill: bool = False,
    key: Path | None = None,
    progress: Progress | None = None,
) -> Published:
    """Uploads a result directory in one go, creating the repository where it is missing.

    `force` uploads a result whose verification failed or was not made; `engines` uploads
    machine-bound engine files too. Files of an earlier upload that this one no longer has are
    removed where they are ours: weights, engines, figures. A dry run does every check that needs
    no network. Names and paths of this machine are refused but for those in `allow`. `bill` adds a
    bill of materials to the directory, `key` a signature with that private key over all else; a dry
    run writes neither.

    Raises:
        PublishError: the directory is not fit for it, or the Hub refuses.
    """
    check_names(repo_id, revision)
    checkpoint = _checkpoint(directory)
    folders = _engine_folders(directory)
    files, left_out = _chosen(checkpoint, folders, machine_bound=engines)
    _check_files(directory, files)
    _check_code(directory, files)
    if not force:
        _check_verified(directory)
    owner = repo_id.partition("/")[0]
    refuse_secrets(directory, files, token, owner=owner, allowed=allow)
    total = sum((directory / name).stat().st_size for name in files)
    if bill or key:
        files, left_out = _attested(directory, files, left_out, bill, key, dry_run=dry_run)
    found = Published(repo_id, "", "", tuple(files), tuple(left_out), total)
    progress = progress or Silent()
    size = f"{len(files)} files, {text_from_bytes(total)}"
    if dry_run:
        progress.say(f"Would upload {size} to {repo_id}")
        return found
    token = found_token(token)
    check_online()
    refuse_secrets(directory, files, token, owner=owner, allowed=allow)
    progress.say(f"Uploading {size} to {repo_id}")
    stale = ("*.safetensors", "model.safetensors.index.json", "figures/*", ".eval_results/*.yaml",
             *(f"{folder}/*" for folder in folders))  # fmt: skip
    url, commit = upload(
        directory, repo_id, files, stale=stale, private=private, revision=revision, token=token,
        endpoint=endpoint, bars=not isinstance(progress, Silent),
    )  # fmt: skip
    progress.say(f"Published {url}")
    return Published(repo_id, url, commit, tuple(files), tuple(left_out), total)


def _attested(
    directory: Path,
    files: list[str],
    left_out: list[str],
    bill: bool,
    key: Path | None,
    *,
    dry_run: bool,
) -> tuple[list[str], list[str]]:
    """Adds the bill and the signature, in this order; those of an earlier upload are replaced."""
    new = [*([BILL] if bill else []), *([SIGNATURE] if key else [])]
    files = [name for name in files if name not in (BILL, SIGNATURE)]
    if not dry_run:
        if bill:
            write_bill(directory, files)
        if key:
            sign(directory, [*files, *([BILL] if bill else [])], key)
    return sorted([*files, *new]), [name for name in left_out if name not in new]


def _engine_folders(directory: Path) -> tuple[str, ...]:
    """Reads from report.json which folders hold engines."""
    try:
        report = read_json_object(directory / "report.json", "a report", REPORT_BYTES)
        names = [str(one["directory"]) for one in report["exports"]]
    except (CheckpointError, KeyError, TypeError):
        return ()
    return tuple(name for name in names if re.fullmatch(r"[\w-]+", name))


def _checkpoint(directory: Path) -> Checkpoint:
    """Opens and validates the checkpoint to publish; refuses pickles."""
    if not directory.is_dir():
        raise PublishError(str(directory), "is not a directory", "give the directory of a run")
    for name, what in {"README.md": "model card", "prune_recipe.lock.json": "lock"}.items():
        if not (directory / name).is_file():
            raise PublishError(str(directory), f"has no {what} ({name})", _WHOLE)
    return _opened(directory)


def _opened(directory: Path, *, weights: bool = True) -> Checkpoint:
    try:
        return Checkpoint.open(directory, weights=weights)
    except CheckpointError as error:
        raise PublishError(error.where, error.problem, _WHOLE) from error


def _chosen(
    checkpoint: Checkpoint, folders: tuple[str, ...], *, machine_bound: bool
) -> tuple[list[str], list[str]]:
    """Sorts the files below the directory into those to publish and the others."""
    root = checkpoint.path
    known = {*checkpoint.files, *checkpoint.side_files()}
    patterns = [*_OURS]
    for folder in folders:
        if (root / folder / "config.json").is_file():
            known |= {*_opened(root / folder, weights=False).side_files()}
        inside = _ENGINE + (_BOUND if machine_bound else ())
        patterns += [f"{folder}/{pattern}" for pattern in inside]
    chosen: list[str] = []
    left_out: list[str] = []
    for path in sorted(root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(root).as_posix()
        ours = path in known or any(_matches(name, pattern) for pattern in patterns)
        (chosen if ours else left_out).append(name)
    return chosen, left_out


def _matches(name: str, pattern: str) -> bool:
    visible = name.removeprefix(".eval_results/")  # the Hub's own name for scores
    return (
        fnmatchcase(name, pattern)
        and name.count("/") == pattern.count("/")
        and not any(part.startswith(".") for part in visible.split("/"))
    )


def _check_files(directory: Path, files: list[str]) -> None:
    for name in files:
        path = directory / name
        if path.is_symlink() or not path.resolve().is_relative_to(directory.resolve()):
            raise PublishError(str(path), "is a link", "copy the file into the directory")
        open_regular(path, None, "a file to publish", error=PublishError).close()
        size = path.stat().st_size
        if size > FILE_LIMIT_BYTES:
            raise PublishError(
                str(path),
                f"has {size:,} bytes, the Hub takes {FILE_LIMIT_BYTES:,} a file",
                "write smaller shards",
            )


def _check_code(directory: Path, files: list[str]) -> None:
    """Refuses code that is not, byte for byte, what this version writes beside a checkpoint.

    Raises:
        PublishError: naming the file.
    """
    for name in _CODE:
        if name not in files:
            continue
        ours = (FOLDER / name).read_bytes()
        if read_regular(directory / name, CARD_BYTES, "code", error=PublishError) != ours:
            raise PublishError(
                str(directory / name),
                "is not the code that this version of prune_export writes, and who loads the "
                "model would run it",
                "remove it and run the recipe again, or publish with the version that wrote it",
            )


def _check_verified(directory: Path) -> None:
    file = directory / "verify.json"
    try:
        found = read_json_object(file, "a verification", REPORT_BYTES) if file.exists() else None
        checks = None if found is None else Verification.from_json(found)
    except (CheckpointError, ValidationError):
        problem = "has a verify.json that cannot be read"
    else:
        if checks is None:
            raise PublishError(str(directory), "was not verified (no verify.json)", _UNVERIFIED)
        if checks.ok:
            return
        failed = [f"gate {gate.what}: claimed {gate.claimed:g}, measured {gate.measured:g}"
                  for gate in checks.gates if not gate.ok]  # fmt: skip
        failed += [f"parity of {one.engine}" for one in checks.parity if not one.ok]
        failed += [] if checks.reload.ok else ["reload"]
        problem = "failed verification: " + "; ".join(failed)
    raise PublishError(str(directory), problem, _UNVERIFIED)
