"""Writes the model repository: a folder for the engine, its config, and a compose file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from prune_export import engines
from prune_export.errors import PlanError, did_you_mean
from prune_export.plugins import load_config
from prune_export_triton import configs

PREFERRED: Final = ("ort_genai", "onnx", "tensorrt")
"""Which engine is taken where none is named."""
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_COMPOSE: Final = """\
# docker compose up: Triton with the models of this folder. The tag must be one whose backends fit:
# the Python backend takes any; TensorRT engines want the release that built them.
services:
  triton:
    build:
      dockerfile_inline: |
        FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG:-25.06-py3}
        RUN pip install --no-cache-dir "onnxruntime-genai>=0.18,<0.19"
    command: tritonserver --model-repository=/models --http-address=0.0.0.0
    ports: ["127.0.0.1:8000:8000", "127.0.0.1:8002:8002"]
    volumes: ["./:/models:ro"]
    shm_size: 1gb
    stop_grace_period: 60s
"""


@dataclass(frozen=True)
class Written:
    """What was written: the model's name and folder, its backend, and its files' bytes."""

    name: str
    folder: Path
    backend: str
    bytes: int


def write_repository(
    directory: Path, to: Path, *, engine: str | None = None, name: str | None = None
) -> Written:
    """Adds an engine of a result, or one on its own, to the model repository `to`.

    Raises:
        PlanError: there is no engine that Triton can serve, or the model is there already.
    """
    held = engines(directory)
    possible = [one for one in PREFERRED if one in held]
    chosen = engine or next(iter(possible), None)
    if chosen not in possible:
        raise PlanError(
            f"--engine {chosen}" if engine else str(directory),
            f"Triton serves engines of {', '.join(PREFERRED)}; there are: {', '.join(held)}",
            did_you_mean(chosen or "", possible)
            if possible
            else "export one, e.g. `prune-export export … --to ort_genai`",
        )
    title = name or directory.resolve().name
    folder = to / title
    if not _NAME.fullmatch(title):
        raise PlanError("--name", f"got {title!r:.80}", "use letters, digits, `.`, `_` and `-`")
    if folder.exists():
        raise PlanError(str(folder), "is there already", "remove it, or give another `--name`")
    found = held[chosen]
    partial = to / f".{title}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "1").mkdir(parents=True)
    text = _WRITERS[chosen](title, found.path, partial / "1", found.parameters)
    (partial / "config.pbtxt").write_text(text, encoding="utf-8")
    compose = to / "compose.yaml"
    if not compose.exists():
        compose.write_text(_COMPOSE, encoding="utf-8")
    partial.rename(folder)
    total = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    return Written(title, folder, _BACKENDS[chosen], total)


def _genai(name: str, engine: Path, version: Path, parameters: Mapping[str, Any]) -> str:
    del parameters
    shutil.copytree(engine, version / "engine")
    model = files("prune_export_triton").joinpath("served_model.py").read_text(encoding="utf-8")
    (version / "model.py").write_text(model, encoding="utf-8")
    return configs.genai(name)


def _onnx(name: str, engine: Path, version: Path, parameters: Mapping[str, Any]) -> str:
    del parameters
    for file in engine.glob("model.onnx*"):
        shutil.copy2(file, version)
    return configs.with_state(name, configs.graph_of(engine / "model.onnx"), "onnxruntime")


def _tensorrt(name: str, engine: Path, version: Path, parameters: Mapping[str, Any]) -> str:
    if parameters.get("flavor") == "rtx":
        raise PlanError(
            str(engine), "is an engine of TensorRT-RTX, which Triton has no backend for",
            "export with `tensorrt: {flavor: tensorrt}` on the GPU that is to run it",
        )  # fmt: skip
    graph = configs.graph_of_config(load_config(engine), parameters)
    beside = engine.parent / "onnx" / "model.onnx"
    if beside.is_file():  # its cache is as narrow as the engine's
        read = configs.graph_of(beside)
        kind = graph.caches[0].kind
        graph = replace(read, logits_kind=graph.logits_kind,
                        caches=tuple(replace(one, kind=kind) for one in read.caches))  # fmt: skip
    shutil.copy2(engine / "model.engine", version / "model.plan")
    return configs.with_state(name, graph, "tensorrt")


_WRITERS: Final[Mapping[str, Callable[[str, Path, Path, Mapping[str, Any]], str]]] = {
    "ort_genai": _genai,
    "onnx": _onnx,
    "tensorrt": _tensorrt,
}
_BACKENDS: Final = {"ort_genai": "python", "onnx": "onnxruntime", "tensorrt": "tensorrt_plan"}
