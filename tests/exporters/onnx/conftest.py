"""One small graph that several files of tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from prune_export.exporters.onnx import Onnx
from tests.exporters.onnx.graphs import exported, saved


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path, Any]:
    """A tiny llama, its directory (`dense`, `onnx`) and the record of its export."""
    path = tmp_path_factory.mktemp("llama")
    model = saved("llama", path / "dense")
    (path / "dense" / "tokenizer.json").write_text("{}")
    return model, path, exported(Onnx(), path / "dense", path / "onnx")
