"""The artifacts of a run, each made through the store: base, data, prune, heal, export.

Every function here says what an artifact depends on (its key) and how it is built. Nothing else
decides whether work is done again.
"""

from __future__ import annotations

import dataclasses
import gc
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import prune_export
from prune_export.calibrate import (
    CalibrationContext,
    ExtraPass,
    ModelView,
    TokenSet,
    changed_since_first,
    inside,
    token_set,
)
from prune_export.checkpoint import Checkpoint, card_license, import_gguf, read_gguf_header
from prune_export.contracts import Refitting, Work
from prune_export.errors import PruneExportError, StageError
from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.recipe import CONVERSATIONS, Export, LocalText, Source, Stage, TokenFile
from prune_export.store import Artifact, Key, Store, sha256_of_json
from prune_export.surgery import rewrite
from prune_export.units import text_from_name

_IMPORT_VERSION: Final = "1"
_DATA_VERSION: Final = "1"
_CHANGED_DATA_VERSION: Final = "2"
"""Of data that come out otherwise than they first did; all others keep their ids."""


@dataclass(frozen=True)
class Base:
    """The model that a run starts from. `id` is made of its files' hashes, not of its place.

    `license` is what its card or its GGUF header says, None where neither says one.
    """

    spec: str
    revision: str | None
    path: Path
    id: str
    license: str | None = None

    @property
    def name(self) -> str:
        """What may be published: a Hub id, or the last part of a local path."""
        return self.spec if self.revision else text_from_name(Path(self.spec).name)


@dataclass(frozen=True)
class RunContext:
    """What every artifact of a run is made with."""

    store: Store
    machine: Machine
    progress: Progress
    force: frozenset[str] = frozenset()
    ignore_keys: tuple[str, ...] = ()
    command: str = ""

    def make(
        self, key: Key, label: str, build: Callable[[Path, Work], Mapping[str, Any]]
    ) -> Artifact:
        """The artifact of `key`, told on the progress, with unexpected errors explained.

        Raises:
            StageError: `build` failed in a way that nobody foresaw; the log is kept.
        """

        def guarded(files: Path, scratch: Path) -> Mapping[str, Any]:
            try:
                return build(files, Work(self.machine, self.progress, scratch))
            except PruneExportError:
                raise
            except MemoryError:
                raise StageError(
                    label,
                    "ran out of memory",
                    "use fewer or shorter samples, or `--ram` to plan with less",
                ) from None
            except Exception as error:
                log = scratch.parent / "error.log"
                log.write_text(traceback.format_exc(), encoding="utf-8")
                raise StageError(
                    label,
                    f"failed: {type(error).__name__}: {error}",
                    f"the log is {log}; what was finished is kept, go on with\n  {self.command}",
                ) from error
            finally:
                if self.machine.device == "cuda":
                    _hand_back()

        forced = not self.force.isdisjoint({key.kind, key.name, f"{key.kind}.{key.name}"})
        before = None if forced else self.store.get(key.id)
        if before is not None:
            self.progress.say(f"{label}: already there")
            return before
        self.progress.say(label)
        return self.store.make(
            key,
            guarded,
            force=forced,
            waiting=lambda: self.progress.say(f"{label}: another process is at it; waiting"),
        )


def open_base(context: RunContext, spec: str, path: Path, revision: str | None) -> Base:
    """The model at `path`: a directory as it lies, or a GGUF file imported once."""
    if path.suffix == ".gguf":
        return base_from_gguf(context, spec, path)
    return base_from_directory(context, spec, path, revision)


def base_from_gguf(context: RunContext, spec: str, file: Path) -> Base:
    """The plain checkpoint of a GGUF file, dequantized once."""
    key = Key("import", "gguf", _IMPORT_VERSION, {}, (context.store.file_hash(file),))

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        import_gguf(file, files, work.progress)
        return {}

    artifact = context.make(key, f"import {file.name}", build)
    said = read_gguf_header(file).metadata.get("general.license")
    return Base(spec, None, artifact.path, artifact.id, str(said) if said else None)


def base_from_directory(context: RunContext, spec: str, path: Path, revision: str | None) -> Base:
    """A checkpoint directory as it lies, known by the hashes of what decides its computation."""
    checkpoint = Checkpoint.open(path)
    decisive = [path / "config.json", *checkpoint.files, *checkpoint.side_files()]
    with context.progress.task("hash the model's files", len(decisive)) as task:
        hashes = {}
        for file in decisive:
            hashes[file.name] = context.store.file_hash(file)
            task.advance()
    return Base(spec, revision, path, f"model-{sha256_of_json(hashes)[:24]}", card_license(path))


def make_tokens(
    context: RunContext,
    name: str,
    source: Source,
    root: Path,
    base: Base,
    exclude: Collection[str] = (),
) -> tuple[Artifact, TokenSet]:
    """The token windows of a data source below `root`, less the documents in `exclude` (hashes)."""
    parameters = source.model_dump(mode="json")
    checkpoint = Checkpoint.open(base.path)
    talks = not isinstance(source, TokenFile) and source.column == CONVERSATIONS
    tokenizer = [
        file
        for file in checkpoint.side_files()
        if _tokenizes(file) or (talks and file.name.startswith("chat_template"))
    ]
    inputs = [f"{file.name}:{context.store.file_hash(file)}" for file in tokenizer]
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


def run_prune(
    context: RunContext,
    stage: Stage,
    source: Path,
    source_id: str,
    data: tuple[Artifact, TokenSet] | None,
) -> Artifact:
    """The checkpoint after a prune stage; `record["log"]` says what was removed and why."""
    key = Key(
        "prune",
        stage.name,
        stage.entry.VERSION,
        stage.parameters(),
        (source_id,),
        data[1].fingerprint if data else None,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        checkpoint = Checkpoint.open(source)
        arch = checkpoint.arch(context.ignore_keys)
        asked = stage.entry.statistics(arch)
        if isinstance(stage.entry, Refitting):
            asked += stage.entry.passes_with_data(arch)
        view = ModelView(arch, checkpoint, {})
        if asked and data:
            # Here, as engines are artifacts themselves.
            from prune_export.run.timing import TimedEngines

            engines = TimedEngines(context, arch, source, source_id)
            calibration = CalibrationContext(
                data[1], work.machine, work.scratch, work.progress, engines
            )
            view = replace(view, context=calibration)
            first = [statistic for statistic in asked if not isinstance(statistic, ExtraPass)]
            view = replace(view, results=view.gather(first))
        decision = stage.entry.decide(view)
        after = rewrite(
            checkpoint,
            arch,
            decision.edits,
            files,
            ram_bytes=work.machine.ram_bytes,
            progress=work.progress,
        )
        return {
            "log": dict(decision.log),
            "parameters": after.arch(context.ignore_keys).parameters(),
            "bytes": after.nbytes,
        }

    return context.make(key, f"prune: {stage.name}", build)


def run_heal(
    context: RunContext, stage: Stage, source: Path, source_id: str, data: tuple[Artifact, TokenSet]
) -> Artifact:
    """The checkpoint after a heal stage; `record["log"]` holds the loss curve."""
    key = Key(
        "heal",
        stage.name,
        stage.entry.VERSION,
        stage.parameters(),
        (source_id,),
        data[1].fingerprint,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        record = stage.entry.heal(source, data[1], files, work)
        after = Checkpoint.open(files)
        return {
            "log": dict(record.log),
            "steps": record.steps,
            "trained_tokens": record.trained_tokens,
            "bytes": after.nbytes,
            "parameters": after.arch(context.ignore_keys).parameters(),
        }

    return context.make(key, f"heal: {stage.name}", build)


def export_engine(
    context: RunContext,
    export: Export,
    source: Path,
    source_id: str,
    *,
    of: str = "",
    tokens: TokenSet | None = None,
) -> Artifact:
    """The engine of a checkpoint; the record is its BuildRecord.

    `tokens` reach exporters that calibrate, and are part of what their engines depend on.
    """
    read = tokens if export.calibrates else None
    key = Key(
        "export",
        export.name,
        export.entry.VERSION,
        export.parameters(),
        (source_id,),
        read.fingerprint if read else None,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        work = replace(work, tokens=read)
        record = dataclasses.asdict(export.entry.export(source, files, work))
        return record | {
            "parameters": dict(record["parameters"]),
            "notes": list(record["notes"]),
            "toolchain": dict(record["toolchain"]),
            "sparsity": dict(record["sparsity"]),
        }

    return context.make(key, f"export: {export.name}{of}", build)


def versions() -> dict[str, str]:
    """What wrote the lock: this tool's version."""
    return {"prune_export": prune_export.__version__}


def _hand_back() -> None:
    """Frees GPU memory that torch only keeps: engines are verified in processes of their own."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


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
