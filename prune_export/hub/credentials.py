"""Looks for credentials, and for traces of who and where, in files about to leave this machine."""

from __future__ import annotations

import codecs
import getpass
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from prune_export.errors import PublishError
from prune_export.system.files import open_regular, shown

_BEGIN: Final = rb"(?:\b|(?<=\n[\x10-\x7f]))"
"""Where a word begins; in a vocabulary of protobuf the length of the text stands before it."""

_SECRETS: Final = {
    "a Hugging Face token": _BEGIN + rb"(?:hf|api_org)_[A-Za-z0-9]{20,}\b",
    "a GitHub token": _BEGIN + rb"(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})\b",
    "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "a PyPI token": rb"\bpypi-AgEI[A-Za-z0-9_-]{40,}",
    "an AWS access key": _BEGIN + rb"AKIA[0-9A-Z]{16}\b",
    "a Google API key": rb"\bAIza[A-Za-z0-9_-]{35}",
    "an API key": rb"\b(?:sk|nvapi|xox[abprs])-[A-Za-z0-9_-]{24,}|\b[rs]k_live_[A-Za-z0-9]{24,}",
    "a signed web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in an address": rb"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>\\]{1,64}"
    rb":[^\s/@\"'<>\\]{3,64}@[\w.-]",
    "a secret of the environment": rb"\b[A-Z][A-Z0-9_]{0,40}(?:API_KEY|SECRET|PASSWORD|TOKEN)="
    rb"[\"']?[A-Za-z0-9+/_.-]{8,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}

_HOMES: Final = (
    rb"(?<![\w./:~*-])/(?:home|Users)/[A-Za-z0-9_][\w.-]*(?=[/\s\"'<)\]:,]|$)[\w./+-]*"
    rb"|\b[A-Za-z]:(?:\\{1,2}|/)Users(?:\\{1,2}|/)[^\\/\s\"'<>:]+"
)
_PLACES: Final = (
    rb"(?<![\w./:~*-])/(?:root|tmp|var|mnt|media|data|datasets|scratch|work|workspace|opt|srv|usr|nfs|"
    rb"gpfs|lustre|private|content|kaggle|projects?|storage|Volumes)/[\w.-]+[\w./+-]*"
    rb"|\b[A-Za-z]:\\{1,2}[A-Za-z][\w. -]*\\{1,2}[\w.-]+"
)
"""Absolute paths by the directories that they begin with: a graph names its nodes like paths."""

_WORDS: Final = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken",
    "*.jinja", "LICENSE*", "*.py",
)  # fmt: skip
"""Files that were the base's, whose words may be paths and names of nobody here."""

_BINARY: Final = (".onnx", ".png", ".safetensors", ".plan", ".engine", ".trt", ".grid")
"""Files in which a short word is found by chance."""

_NOBODY: Final = frozenset(
    {
        "root", "user", "users", "admin", "ubuntu", "debian", "runner", "docker", "node", "jovyan",
        "vscode", "codespace", "colab", "guest", "nobody", "default", "model", "models", "test",
        "tests", "data", "prune", "python", "build", "worker", "localhost",
    }
)  # fmt: skip
"""Names that tell nothing."""

_SHORTEST_NAME: Final = 4

_CHUNK: Final = 1 << 22
_OVERLAP: Final = 256
_RAW: Final = (".onnx_data", ".onnx.data")
"""Weights without a word beside them: not looked through for secrets."""


def refuse_secrets(
    directory: Path,
    files: Iterable[str],
    token: str | None,
    *,
    owner: str = "",
    allowed: Iterable[str] = (),
) -> None:
    """Refuses a file that holds a credential, this user's or this machine's name, or a path here.

    Whatever a file is called: a tokenizer.model, a graph and a picture hold text too, and so does
    the header of a weight file. Only raw weights are left out. In a tokenizer's words only this
    user's own home is looked for. Of a credential the error says where and never what; a name or a
    path it says, and passes where it is among `allowed` or below one of these. A user who is called
    like the repository's `owner` has no name to hide.

    Raises:
        PublishError: naming file and line.
    """
    kinds = dict(_SECRETS)
    if token:
        kinds["the token of this upload"] = re.escape(token.encode())
    secrets = {what: re.compile(pattern) for what, pattern in kinds.items()}
    known = names_here(owner)
    passing = tuple(one.rstrip("/") for one in allowed if one.strip("/"))
    for name in files:
        if name.endswith(_RAW):
            continue
        traces = _traces(name, known)
        for line, text in _chunks(directory / name):
            for what, pattern in secrets.items():
                if match := pattern.search(text):
                    where = line + text.count(b"\n", 0, match.start())
                    raise PublishError(
                        f"{directory / name}:{where}",
                        f"holds what looks like {what}",
                        "remove it and revoke it; nothing was uploaded",
                    )
            for what, pattern in traces.items():
                for match in pattern.finditer(text):
                    found = match[0].decode("utf-8", "replace")
                    if any(found == one or found.startswith(f"{one}/") for one in passing):
                        continue
                    where = line + text.count(b"\n", 0, match.start())
                    raise PublishError(
                        f"{directory / name}:{where}",
                        f"holds {what}: {shown(found)}",
                        "remove it, or publish with `--allow` and that text; nothing was uploaded",
                    )


def names_here(owner: str = "") -> dict[str, str]:
    """This user's and this machine's name and home, as far as they tell who and where it is."""
    found: dict[str, str] = {}
    with suppress(KeyError, OSError, ImportError):  # a user without an entry
        found["this user's name"] = getpass.getuser()
    found["this machine's name"] = socket.gethostname()
    found = {
        what: name
        for what, name in found.items()
        if len(name) >= _SHORTEST_NAME and name.lower() not in _NOBODY and name != owner
    }
    with suppress(RuntimeError):
        home = str(Path.home())
        if home.count("/") + home.count("\\") >= 2:
            found["this user's home"] = home
    return found


def _traces(name: str, known: Mapping[str, str]) -> dict[str, re.Pattern[bytes]]:
    """What to look for in a file besides secrets."""
    base = name.rpartition("/")[2]
    patterns: dict[str, bytes] = {}
    for what, text in known.items():
        word = re.escape(text.encode())
        if what == "this user's home":
            patterns[what] = word + rb"(?![\w-])"
        elif not (base.endswith(_BINARY) or _is_any(base, _WORDS)):
            patterns[what] = rb"(?<![\w-])" + word + rb"(?![\w-])"
    if not _is_any(base, _WORDS):
        patterns |= {"a path in a home directory": _HOMES, "an absolute path": _PLACES}
    return {what: re.compile(pattern) for what, pattern in patterns.items()}


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (first line number, bytes) of overlapping pieces, so that no match is cut in two.

    Of safetensors only the header; of UTF-16 the ASCII in it.
    """
    line, tail = 1, b""
    with open_regular(path, error=PublishError) as file:
        start = file.read(8)
        wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        left = int.from_bytes(start, "little") if path.suffix == ".safetensors" else None
        file.seek(0 if left is None else len(start))
        while block := file.read(_CHUNK if left is None else min(_CHUNK, left)):
            left = left if left is None else left - len(block)
            text = tail + (block.replace(b"\0", b"") if wide else block)
            yield line, text
            tail = text[-_OVERLAP:]
            line += text.count(b"\n", 0, len(text) - len(tail))
