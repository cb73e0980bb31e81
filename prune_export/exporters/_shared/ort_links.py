"""Opens ONNX graphs in the Hub's cache, whose external data ONNX Runtime does not find by itself.

There each file is a link. The runtime follows them, and takes external data only from the directory
where the graph itself ends up; since huggingface_hub 2 that is another one for each file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from prune_export.errors import CheckpointError
from prune_export.sparsity.onnx_weights import load
from prune_export.system.cached import is_within

_FOLDER: Final = "session.model_external_initializers_file_folder_path"


def openable(graph: Path, options: Any) -> str | bytes:
    """What to open a session of: the path, or a graph whose external data have resolved paths.

    Raises:
        CheckpointError: the graph names data that are not of the same model.
    """
    if not graph.is_symlink():
        return str(graph)  # the runtime itself refuses data from elsewhere
    folder = graph.parent
    model = load(graph)
    held = [entry for tensor in _tensors(model.graph) for entry in tensor.external_data
            if entry.key == "location"]  # fmt: skip
    real = {}
    for name in {entry.value for entry in held}:
        if not is_within(folder / name, folder):
            raise CheckpointError(
                str(folder / name),
                f"is outside of the graph's directory, but {graph.name} names it",
                "do not use this engine: a sound one names files beside its graph",
            )
        real[name] = Path(os.path.realpath(folder / name))
    if all(file.is_relative_to(graph.resolve().parent) for file in real.values()):
        return str(graph)
    common = Path(os.path.commonpath([file.parent for file in real.values()]))
    for entry in held:
        entry.value = str(real[entry.value].relative_to(common))
    options.add_session_config_entry(_FOLDER, str(common))
    changed: bytes = model.SerializeToString()
    return changed


def _tensors(graph: Any) -> Iterator[Any]:
    """Yields every constant of a graph and of its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for given in node.attribute:
            yield given.t
            yield from given.tensors
            for inner in (given.g, *given.graphs):
                yield from _tensors(inner)
