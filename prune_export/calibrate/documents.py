"""Texts from local files and from Hub datasets, one document at a time, in a fixed order."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from prune_export.errors import MissingExtra, PlanError, did_you_mean
from prune_export.recipe.sources import HubDataset, LocalText

LONGEST_DOCUMENT_BYTES: Final = 256 * 1024**2
"""No honest document is longer; a file that is would otherwise fill the memory."""

SUFFIXES: Final = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
SHUFFLE_BUFFER: Final = 10_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def hash_of(text: str) -> str:
    """A document's hash: the first 16 hex digits of its text's sha256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def inside(root: Path, pattern: str, where: str) -> list[Path]:
    """The files below `root` that a relative path or glob names, sorted.

    Raises:
        PlanError: it leaves `root`, by itself or through a link, or names nothing.
    """
    parts = Path(pattern).parts
    leaves = f"`{pattern}` leaves the data directory"
    fix = "name a relative path below the data directory (`--data-root` moves it)"
    if Path(pattern).is_absolute() or ".." in parts or not parts:
        raise PlanError(where, leaves, fix)
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    for path in found:
        if not path.resolve().is_relative_to(root.resolve()):
            raise PlanError(where, f"{leaves}: {path.relative_to(root)} is a link out of it", fix)
    if not found:
        raise PlanError(where, f"`{pattern}` names no file", "check the path and the spelling")
    return found


def local_files(source: LocalText, root: Path) -> list[Path]:
    """The files of a source, each once, in the order of its patterns.

    Raises:
        PlanError: a pattern leaves `root` or names nothing, or a file has another format.
    """
    found: dict[Path, None] = {}
    for pattern in source.files:
        found |= dict.fromkeys(inside(root, pattern, f"data files  {pattern}"))
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise PlanError(
                f"data files  {path.name}",
                f"has another format, expected one of {', '.join(SUFFIXES)}",
                'convert it to JSON lines: one {"text": …} a line',
            )
    return list(found)


def local_texts(files: Iterable[Path], column: str) -> Iterator[str]:
    """The documents of local files: a text file is one, a line or row of the others is one.

    Raises:
        PlanError: a line is not JSON, or has no text in `column`.
    """
    for path in files:
        if path.name.endswith(".parquet"):
            yield from _parquet_texts(path, column)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_texts(path, column)
        else:
            with _opened(path) as file:
                yield _bounded(file.read(LONGEST_DOCUMENT_BYTES + 1), path).decode(
                    "utf-8", "replace"
                )


def hub_texts(source: HubDataset, revision: str, *, shuffle: bool) -> Iterator[str]:
    """The documents of a Hub dataset at a commit, streamed.

    Raises:
        MissingExtra: `datasets` is not installed.
        PlanError: the Hub cannot be reached, or there is no such dataset, split or column.
    """
    datasets = _datasets()
    where = f"data  {source.dataset}"
    try:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=revision, streaming=True
        )
        if shuffle:
            rows = rows.shuffle(seed=source.seed, buffer_size=SHUFFLE_BUFFER)
        for row in rows:
            yield _text_of(row, source.column, where)
    except PlanError:
        raise
    except Exception as error:
        # `datasets` lets through whatever httpx, fsspec, pyarrow or a broken dataset raise.
        raise _unreachable(where, error) from error


def hub_revision(source: HubDataset) -> str:
    """The commit that a source's revision means now.

    Raises:
        PlanError: the id is not a Hub id, or the Hub cannot be reached.
    """
    where = f"data  {source.dataset}"
    if not _HUB_ID.fullmatch(source.dataset) or Path(source.dataset).exists():
        # `datasets` would read a local directory of that name, wherever it is.
        raise PlanError(
            where,
            "is not a Hub dataset id",
            "write `owner/name`; for local files write `files: […]`",
        )
    _datasets()
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(source.dataset, revision=source.revision, timeout=30).sha
    except Exception as error:
        # Offline mode, DNS, proxies, rate limits, missing datasets: each raises its own.
        raise _unreachable(where, error) from error
    return str(found)


def _unreachable(where: str, error: Exception) -> PlanError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PlanError(
        where,
        f"could not be read from the Hub: {reason:.300}",
        "check the id, split and network; without a network use local text "
        "(`files: [text/*.jsonl]`)",
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra.of("data from the Hub", "datasets", "data") from None
    return datasets


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra.of(f"data files  {path.name}", "pyarrow", "data") from None
    where = f"data files  {path.name}"
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise PlanError(
                    where,
                    f"has no column `{column}`",
                    did_you_mean(column, file.schema_arrow.names),
                )
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield _text_of({column: text}, column, where)
    except (OSError, ValueError) as error:
        raise PlanError(where, f"is not Parquet: {error}", "write the file again") from None


def _json_texts(path: Path, column: str) -> Iterator[str]:
    with _opened(path) as file:
        number = 0
        while line := file.readline(LONGEST_DOCUMENT_BYTES + 1):
            number += 1
            if not _bounded(line, path).strip():
                continue
            where = f"data files  {path.name}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PlanError(
                    where, f"is not JSON: {error}", 'write one {"text": …} a line'
                ) from None
            yield _text_of(row, column, where)


def _text_of(row: Any, column: str, where: str) -> str:
    if isinstance(row, Mapping) and isinstance(row.get(column), str):
        return str(row[column])
    known = [str(key) for key in row] if isinstance(row, Mapping) else []
    raise PlanError(where, f"has no text in `{column}`", did_you_mean(column, known))


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))  # type: ignore[type-var,return-value]
    return path.open("rb")


def _bounded(data: bytes, path: Path) -> bytes:
    if len(data) > LONGEST_DOCUMENT_BYTES:
        raise PlanError(
            f"data files  {path.name}",
            f"holds a document of more than {LONGEST_DOCUMENT_BYTES} bytes",
            "split it into documents, one a line of a .jsonl",
        )
    return data
