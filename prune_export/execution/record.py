"""Makes report.json, from which the table, the HTML report and the model card are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import Base
from prune_export.machine import cpu_features, describe
from prune_export.recipe import PUBLISHED_NAME, Recipe
from prune_export.store import Artifact
from prune_export.verify.results import Verification


def report_of(
    context: RunContext,
    recipe: Recipe,
    base: Base,
    data: Mapping[str, tuple[Artifact, TokenSet]],
    stages: Sequence[Artifact],
    exports: Sequence[Artifact],
    found: Verification,
) -> dict[str, Any]:
    """Makes the report of a run; every number in it was measured or counted."""
    source = Checkpoint.open(base.path)
    last = Checkpoint.open(stages[-1].path) if stages else source
    return {
        "version": 1,
        "recipe": {
            "name": recipe.name,
            "description": recipe.description,
            "text": recipe.to_yaml(),
        },
        "base": {
            "model": base.name,
            "id": base.id,
            "revision": base.revision,
            "license": base.license,
            "dtype": source.dtype,
            **({"wrapper": source.wrapped.model_type} if source.wrapped else {}),
            **_size(context, source),
        },
        "result": _size(context, last),
        "stages": [
            {
                "index": index,
                "kind": stage.kind,
                "name": stage.name,
                "parameters": stage.parameters(),
                "data": stage.data,
                "id": artifact.id,
                "seconds": artifact.seconds,
                "parameters_after": artifact.record["parameters"],
                "bytes_after": artifact.record["bytes"],
                "log": artifact.record["log"],
                **({"round": [stage.round.number, stage.round.of]} if stage.round else {}),
            }
            for index, (stage, artifact) in enumerate(zip(recipe.stages, stages, strict=True))
        ],
        "exports": [
            {"directory": type(export.entry).DIRECTORY, **artifact.record}
            for export, artifact in zip(recipe.export, exports, strict=True)
        ],
        "data": {
            name: {
                "samples": made.record["samples"],
                "length": made.record["length"],
                "fingerprint": tokens.fingerprint,
                **made.record["provenance"],
            }
            for name, (made, tokens) in sorted(data.items())
        },
        "verification": found.to_json(),
        # What a reproduction elsewhere may come out otherwise by.
        "machine": describe() | {"instructions": " ".join(cpu_features())},
        "command": f"prune-export run {PUBLISHED_NAME} --model {base.name} --out out",
    }


def _size(context: RunContext, checkpoint: Checkpoint) -> dict[str, int]:
    arch = checkpoint.arch(context.ignore_keys)
    return {"parameters": arch.parameters(), "bytes": checkpoint.nbytes, "layers": arch.layers}
