"""Texts and conversations from local files and Hub datasets, one document at a time, in order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate.data.conversations import (
    Conversation,
    conversation_of,
    kind_of,
    refuse_half_pairs,
)
from prune_export.calibrate.data.decoding import LONGEST_DOCUMENT_BYTES, lines, whole
from prune_export.errors import MissingExtra, PlanError, did_you_mean
from prune_export.recipe.sources import CONVERSATIONS, HubDataset, LocalText
from prune_export.system.files import open_regular

SHUFFLE_BUFFER: Final = 10_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Text = str | Conversation


def hash_of(text: Text) -> str:
    """Hashes a document: the first 16 hex digits of the sha256 of its text."""
    if isinstance(text, Conversation):
        return text.hash
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def texts_of(files: Iterable[Path], source: LocalText) -> Iterator[Text]:
    """Yields all documents of local files: a text file is one, and each line or row of others.

    Raises:
        PlanError: a file cannot be read or is not text, or a line or row holds something else.
    """
    for path in files:
        if path.name.endswith(".parquet"):
            yield from _parquet_texts(path, source.column)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_texts(path, source.column, source.encoding)
        elif path.name.endswith(".json"):
            yield from _json_list(path, source.column, source.encoding)
        else:
            text = whole(path, source.encoding)
            refuse_half_pairs(text, f"data files  {path.name}")
            yield text


def column_of(files: Iterable[Path]) -> str:
    """Finds the field in which files have their text: `text`, `messages`, or the only one of text.

    Raises:
        PlanError: there are several, or none, or a file cannot be read.
    """
    for path in files:
        if path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet")):
            return _column_in(path)
    return "text"


def _column_in(path: Path) -> str:
    row: Any = next(_rows(path), {})
    if not isinstance(row, Mapping):
        return "text"
    named = [name for name in ("text", CONVERSATIONS) if name in row]
    texts = [name for name in _names(row) if isinstance(row.get(name), str)]
    if named or len(texts) == 1:
        return (named or texts)[0]
    raise PlanError(
        f"data files  {path.name}",
        f"has {len(texts)} fields that could be the text: {', '.join(texts[:8]) or 'none'}",
        "keep one of them, or call it `text`",
    )


def _rows(path: Path) -> Iterator[Any]:
    """Yields the first rows of a file of JSON or Parquet, as far as they can be read."""
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    if path.name.endswith(".json"):
        text = whole(path, None)
        with suppress(ValueError, RecursionError):
            found = json.loads(text)
            yield from found if isinstance(found, list) else [found]
            return
    for _, line in lines(path, None):
        if line.strip():
            with suppress(ValueError, RecursionError):
                yield json.loads(line)
            return


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra.of(f"data files  {path.name}", "pyarrow", "data") from None
    with (
        suppress(pa.ArrowException, OSError, ValueError),
        open_regular(path, None, "Parquet", error=PlanError) as stream,
    ):
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1):
            yield from batch.to_pylist()
            return


def hub_texts(source: HubDataset, revision: str, *, shuffle: bool) -> Iterator[Text]:
    """Streams the documents of a Hub dataset at a commit.

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
        for number, row in enumerate(rows):
            yield text_of(row, source.column, f"{where}  row {number}")
    except PlanError:
        raise
    except Exception as error:
        # `datasets` lets through whatever httpx, fsspec, pyarrow or a broken dataset raise.
        raise _unreachable(where, error) from error


def hub_revision(source: HubDataset) -> str:
    """Resolves the revision of a Hub dataset to a commit.

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


def _parquet_texts(path: Path, column: str) -> Iterator[Text]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra.of(f"data files  {path.name}", "pyarrow", "data") from None
    where = f"data files  {path.name}"
    row = 0
    try:
        with (
            open_regular(path, None, "Parquet", error=PlanError) as stream,
            parquet.ParquetFile(stream) as file,
        ):
            _refuse_no_column(file.schema_arrow.names, column, where)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    yield text_of({column: value.as_py()}, column, f"{where}  row {row}")
    except PlanError:
        raise
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{where}  row {row}",
            f"is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}",
            "write the file again with text in UTF-8",
        ) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"cannot be read after row {row}" if row else "is not Parquet"
        raise PlanError(
            where, f"{problem}: {reason:.300}", "fetch or write the file again"
        ) from None


def _refuse_no_column(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise PlanError(where, f"has no column `{column}`", did_you_mean(column, names))


def _json_texts(path: Path, column: str, encoding: str | None) -> Iterator[Text]:
    for number, line in lines(path, encoding):
        if not line.strip():
            continue
        where = f"data files  {path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PlanError(
                where, f"is not JSON: {error}", 'write one {"text": …} a line'
            ) from None
        yield text_of(row, column, where)


def _json_list(path: Path, column: str, encoding: str | None) -> Iterator[Text]:
    """Yields the documents of one JSON list of objects or texts; lines of objects will do, too."""
    text = whole(path, encoding)
    if text.lstrip()[:1] != "[":
        yield from _json_texts(path, column, encoding)
        return
    where = f"data files  {path.name}"
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(where, f"is not JSON: {error}", 'write [{"text": …}, …]') from None
    for number, row in enumerate(rows):
        one = {column: row} if isinstance(row, str) else row
        yield text_of(one, column, f"{where}  entry {number}")


def text_of(row: Any, column: str, where: str) -> Text:
    """Reads the text or the conversation that a row of a data set holds.

    Raises:
        PlanError: it is no mapping, has no such column, or holds something else there.
    """
    if not isinstance(row, Mapping):
        raise PlanError(
            where,
            f"is {kind_of(row)}, expected an object with the text in `{column}`",
            f'write {{"{column}": …}}',
        )
    if column not in row:
        raise PlanError(where, f"has no text in `{column}`", did_you_mean(column, _names(row)))
    value = row[column]
    if isinstance(value, str):
        refuse_half_pairs(value, where)
        if len(value) > LONGEST_DOCUMENT_BYTES:
            raise PlanError(
                where, f"holds more than {LONGEST_DOCUMENT_BYTES} characters", "split the document"
            )
        return value
    if isinstance(value, list | tuple) and column == CONVERSATIONS:
        return conversation_of(value, column, where)
    got = f"`{column}` is {kind_of(value)}"
    if value is None:
        fix = 'remove it, or write "" where there is no text'
    elif isinstance(value, list | tuple):
        fix = (
            f"name the column that holds the text; conversations (role and content) are read from "
            f"a column `{CONVERSATIONS}`"
        )
    else:
        fix = "name the column that holds the text"
        texts = _names({key: other for key, other in row.items() if isinstance(other, str)})
        fix += ": " + ", ".join(f"`{name}`" for name in texts[:8]) if texts else ""
    raise PlanError(where, f"{got}, expected text", fix)


def _names(row: Mapping[Any, Any]) -> list[str]:
    """The column names of a row, printable."""
    return [str(key).encode("utf-8", "backslashreplace").decode() for key in row]
