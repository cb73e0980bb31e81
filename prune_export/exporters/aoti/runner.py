"""Runs a compiled step, with the KV cache on the device that it was compiled for."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from prune_export.errors import CheckpointError, StageError
from prune_export.exporters.aoti.graph import Cache, empty_cache
from prune_export.machine import Machine
from prune_export.system.files import read_json_object

PACKAGE: Final = "model.pt2"
ABOUT: Final = "aoti.json"


class _About(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    device: str
    torch: str
    dtype: Literal["float32", "float16", "bfloat16"]
    cache: list[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]]


_ABOUT: Final = TypeAdapter(_About)


def _read_about(file: Path) -> dict[str, Any]:
    """Reads `aoti.json`, which `export` wrote beside the package.

    Raises:
        CheckpointError: a key is missing, or of another type.
    """
    about = read_json_object(file, "an engine's description")
    try:
        return dict(_ABOUT.validate_python(about))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"{file}  {'.'.join(map(str, first['loc']))}", first["msg"], "export the engine again"
        ) from None


class AotiRunner:
    """Runs the compiled package step by step: a `contracts.Runner`."""

    def __init__(self, path: Path, machine: Machine) -> None:
        about = _read_about(path / ABOUT)
        if about["device"] != machine.device:
            raise StageError(
                str(path / PACKAGE),
                f"was compiled for {about['device']}, and is to run on {machine.device}",
                "export it again here, or choose the device that it is for",
            )
        torch.set_num_threads(machine.threads)
        try:
            self._run: Any = torch._inductor.aoti_load_package(str(path / PACKAGE))
        except RuntimeError as error:
            raise StageError(
                str(path / PACKAGE),
                f"PyTorch {torch.__version__} does not load it: {str(error).splitlines()[0]}",
                f"it was compiled by PyTorch {about['torch']}: export it again here",
            ) from error
        self._sizes = [(int(heads), int(size)) for heads, size in about["cache"]]
        self._like = torch.empty(0, dtype=getattr(torch, about["dtype"]), device=machine.device)
        self._cache: Cache | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._run = self._cache = None

    def reset(self) -> None:
        """Empties the KV cache."""
        self._cache = None

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Runs `ids` int64 `[batch, new]` after the tokens in the cache."""
        batch, new = ids.shape
        past = self._cache or empty_cache(self._sizes, batch, 0, self._like)
        seen = past[0][0].shape[2]
        device = self._like.device
        fed = torch.from_numpy(np.ascontiguousarray(ids)).to(device)
        mask = torch.ones(batch, seen + new, dtype=torch.long, device=device)
        positions = torch.arange(seen, seen + new, device=device).repeat(batch, 1)
        _wait(device)
        start = perf_counter()
        with torch.no_grad():
            logits, self._cache = self._run(fed, mask, positions, past)
        _wait(device)
        seconds = perf_counter() - start
        found: np.ndarray = logits.float().cpu().numpy()
        return found, seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
