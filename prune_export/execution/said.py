"""Data of a run: token sets of text, and of what a model says, which is asked for first.

Answers are an artifact of their own: what they cost is not spent again when only windows change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import TokenSet, read_samples, tokens_of_samples
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import Base, make_tokens, tokenizer_hashes
from prune_export.generated import ANSWERS, Speaker, generate
from prune_export.generated.cost import speaker_at
from prune_export.generated.local import dense, local_at
from prune_export.generated.prompts import bundled_hash, prompt_files, prompts_of
from prune_export.recipe import DENSE, Generated, Source
from prune_export.store import Artifact, Key, sha256_of_json
from prune_export.units import text_from_name

_ANSWERS_VERSION: Final = "1"
_DATA_VERSION: Final = "1"


def make_data(
    context: RunContext,
    name: str,
    source: Source,
    root: Path,
    base: Base,
    exclude: Collection[str] = (),
) -> tuple[Artifact, TokenSet]:
    """Makes the token windows of any data source, without the documents in `exclude` (hashes)."""
    if not isinstance(source, Generated):
        return make_tokens(context, name, source, root, base, exclude)
    excluded = frozenset(exclude)
    said = _make_answers(context, name, source, root, base, excluded)
    checkpoint = Checkpoint.open(base.path)
    vocabulary = checkpoint.arch(context.ignore_keys).sizes["vocab"]
    key = Key(
        "data",
        name,
        _DATA_VERSION,
        source.model_dump(mode="json", exclude={"generated"}),
        (
            *tokenizer_hashes(context, checkpoint, talks=True),
            f"answers:{said.id}:{said.files[ANSWERS]}",
            f"exclude:{sha256_of_json(sorted(excluded))}",
        ),
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        del work
        made = tokens_of_samples(
            source,
            read_samples(said.path / ANSWERS),
            base.path,
            origin={"generated": said.record["told"]},
            exclude=excluded,
            vocabulary=vocabulary,
        )
        made.save(files / "tokens.safetensors")
        return {
            "fingerprint": made.fingerprint,
            "samples": made.ids.shape[0],
            "length": made.ids.shape[1],
            "provenance": dict(made.provenance),
            "answers": said.id,
        }

    artifact = context.make(key, f"tokenize {name}", build)
    return artifact, TokenSet.load(artifact.path / "tokens.safetensors")


def _make_answers(
    context: RunContext,
    name: str,
    source: Generated,
    root: Path,
    base: Base,
    exclude: frozenset[str],
) -> Artifact:
    """Asks for the answers of a source, or takes them from the store."""
    generation = source.generated
    inputs = [f"exclude:{sha256_of_json(sorted(exclude))}"]
    if generation.prompts == "bundled":
        inputs.append(f"prompts:{bundled_hash()}")
    inputs += [
        f"{file.relative_to(root)}:{context.store.file_hash(file)}"
        for file in prompt_files(generation, root)
    ]
    parameters: dict[str, Any] = generation.drawing()
    if generation.is_server:
        speaker = Speaker(str(generation.model), None)
    else:
        if generation.speaker == DENSE:
            inputs.append(f"dense:{base.id}")
            speaker = Speaker(base.name, dense(base.path, context.machine))
        else:
            place = speaker_at(generation, root)
            inputs += [
                f"{file.relative_to(place)}:{context.store.file_hash(file)}"
                for file in sorted(place.rglob("*"))
                if file.is_file()
            ]
            local = local_at(place, context.machine, learner=base.path)
            speaker = Speaker(text_from_name(place.name), local)
        inputs += tokenizer_hashes(context, Checkpoint.open(base.path), talks=True)
        if generation.answers is None:
            # Then there are as many as the windows take.
            parameters["windows"] = source.model_dump(mode="json", exclude={"generated", "seed"})
    key = Key("generated", name, _ANSWERS_VERSION, parameters, tuple(inputs))

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        told = generate(
            source,
            speaker,
            prompts_of(generation, root, exclude),
            base.path,
            files,
            machine=work.machine,
            scratch=work.scratch,
            progress=work.progress,
            exclude=exclude,
        )
        return {"told": told}

    return context.make(key, f"ask {speaker.name} for {name}", build)
