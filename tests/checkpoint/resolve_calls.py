"""Resolves the models named in JSON on standard input, one after another; prints what came of it.

A process of its own, because huggingface_hub reads whether it is offline when it is imported.
"""

from __future__ import annotations

import json
import sys

from prune_export.checkpoint import Checkpoint, resolve_model
from prune_export.errors import PruneExportError

outcomes = []
for call in json.load(sys.stdin):
    try:
        path, revision = resolve_model(**call)
        weights = call.get("weights", True)
        tensors = len(Checkpoint.open(path, weights=weights).entries)
        files = sorted(str(file.relative_to(path)) for file in path.rglob("*"))
        outcomes.append({"revision": revision, "files": files, "tensors": tensors})
    except PruneExportError as error:
        outcomes.append({"error": type(error).__name__, "text": str(error), "fix": error.fix})
print(json.dumps(outcomes))
