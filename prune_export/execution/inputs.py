"""Prepares the inputs of a run, through the store: the base model and the token sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import (
    TokenSet,
    changed_since_first,
    inside,
    token_set,
)
from prune_export.checkpoint import (
    Checkpoint,
    Packed,
    card_license,
    import_gguf,
    import_packed,
    packed_in,
    read_gguf_header,
)
from prune_export.contracts import Work
from prune_export.execution.context import RunContext
from prune_export.recipe import CONVERSATIONS, LocalText, TextSource, TokenFile
from prune_export.store import Artifact, Key, sha256_of_json
from prune_export.surgery import rewrite
from prune_export.units import text_from_name

_IMPORT_VERSION: Final = "1"
_DENSE_VERSION: Final = "1"


_DATA_VERSION: Final = "1"


_CHANGED_DATA_VERSION: Final = "2"


"""Of data that come out otherwise than they first did; all others keep their ids."""


@dataclass(frozen=True)
class Base:
    """The base model. `id` is made of its files' hashes, not of its path.

    `license` is what its card or its GGUF header says, None where neither says one.
    """

    spec: str
    revision: str | None
    path: Path
    id: str
    license: str | None = None

    @property
    def name(self) -> str:
        """The name that may be published: a Hub id, or the last part of a local path."""
        return self.spec if self.revision else text_from_name(Path(self.spec).name)


def open_base(context: RunContext, spec: str, path: Path, revision: str | None) -> Base:
    """Opens the model at `path`: a directory as it is; what is packed is dequantized once."""
    if path.suffix == ".gguf":
        return base_from_gguf(context, spec, path)
    if (packed := packed_in(path)) is not None:
        return base_from_packed(context, spec, packed, revision)
    return base_from_directory(context, spec, path, revision)


def base_from_gguf(context: RunContext, spec: str, file: Path) -> Base:
    """Converts a GGUF file to a dequantized safetensors checkpoint."""
    key = Key("import", "gguf", _IMPORT_VERSION, {}, (context.store.file_hash(file),))

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        import_gguf(file, files, work.progress)
        return {}

    artifact = context.make(key, f"import {file.name}", build)
    said = read_gguf_header(file).metadata.get("general.license")
    return Base(spec, None, artifact.path, artifact.id, str(said) if said else None)


def base_from_packed(context: RunContext, spec: str, packed: Packed, revision: str | None) -> Base:
    """Dequantizes a directory of 8-bit or 4-bit floats to a plain checkpoint."""
    digest = sha256_of_json(_hashes(context, packed.source()))
    key = Key("import", packed.method, _IMPORT_VERSION, {}, (digest,))

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        import_packed(packed, files, work.progress)
        return {}

    artifact = context.make(key, f"dequantize {packed.method}", build)
    return Base(spec, revision, artifact.path, artifact.id, card_license(packed.path))


def base_from_directory(context: RunContext, spec: str, path: Path, revision: str | None) -> Base:
    """Opens a checkpoint directory, identified by hashes of all files that matter."""
    digest = sha256_of_json(_hashes(context, Checkpoint.open(path)))
    return Base(spec, revision, path, f"model-{digest[:24]}", card_license(path))


def _hashes(context: RunContext, checkpoint: Checkpoint) -> dict[str, str]:
    """The hashes of all files of a model directory that matter, by name."""
    decisive = [checkpoint.path / "config.json", *checkpoint.files, *checkpoint.side_files()]
    with context.progress.task("hash the model's files", len(decisive)) as task:
        hashes = {}
        for file in decisive:
            hashes[file.name] = context.store.file_hash(file)
            task.advance()
    return hashes


def dense_artifact(context: RunContext, base: Base) -> Artifact:
    """The base model as an artifact, whose files a result may hold: converted, or written anew."""
    known = context.store.get(base.id)
    if known is not None:
        return known
    key = Key("import", "dense", _DENSE_VERSION, {}, (base.id,))

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        checkpoint = Checkpoint.open(base.path)
        rewrite(
            checkpoint,
            checkpoint.arch(context.ignore_keys),
            (),
            files,
            ram_bytes=work.machine.ram_bytes,
            progress=work.progress,
        )
        return {}

    return context.make(key, "write the dense model", build)


def make_tokens(
    context: RunContext,
    name: str,
    source: TextSource,
    root: Path,
    base: Base,
    exclude: Collection[str] = (),
) -> tuple[Artifact, TokenSet]:
    """Makes the token windows of a data source, without the documents in `exclude` (hashes)."""
    parameters = source.model_dump(mode="json")
    checkpoint = Checkpoint.open(base.path)
    talks = not isinstance(source, TokenFile) and source.column == CONVERSATIONS
    inputs = tokenizer_hashes(context, checkpoint, talks=talks)
    patterns: tuple[str, ...] = ()
    if isinstance(source, LocalText):
        patterns = source.files
    elif isinstance(source, TokenFile):
        patterns = (source.tokens,)
    for pattern in patterns:
        inputs += [
            f"{pattern}:{context.store.file_hash(file)}"
            for file in inside(root, pattern, f"data.{name}")
        ]
    excluded = frozenset(exclude)
    inputs.append(f"exclude:{sha256_of_json(sorted(excluded))}")
    changed = changed_since_first(source, base.path, root)
    version = _CHANGED_DATA_VERSION if changed else _DATA_VERSION
    key = Key("data", name, version, parameters, tuple(inputs))
    vocabulary = checkpoint.arch(context.ignore_keys).sizes["vocab"]

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        made = token_set(
            source,
            base.path,
            root,
            exclude=excluded,
            vocabulary=vocabulary,
            progress=work.progress,
        )
        made.save(files / "tokens.safetensors")
        return {
            "fingerprint": made.fingerprint,
            "samples": made.ids.shape[0],
            "length": made.ids.shape[1],
            "provenance": dict(made.provenance),
        }

    artifact = context.make(key, f"tokenize {name}", build)
    return artifact, TokenSet.load(artifact.path / "tokens.safetensors")


def tokenizer_hashes(context: RunContext, checkpoint: Checkpoint, *, talks: bool) -> list[str]:
    """Hashes of a tokenizer's files, `talks` with its chat template, as an artifact's inputs."""
    return [
        f"{file.name}:{context.store.file_hash(file)}"
        for file in checkpoint.side_files()
        if _tokenizes(file) or (talks and file.name.startswith("chat_template"))
    ]


def _tokenizes(file: Path) -> bool:
    return file.name.startswith(
        (
            "tokenizer",
            "vocab",
            "merges",
            "special_tokens",
            "added_tokens",
            "spiece",
            "tekken",
            "sentencepiece",
        )
    )
