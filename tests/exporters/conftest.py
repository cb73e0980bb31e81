"""Graphs of the tiny model that several tests of exporters start from."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from prune_export.contracts import Work
from prune_export.exporters.tensorrt.graph import split_caches


@pytest.fixture(scope="session")
def split_graph(tiny_graph: Path) -> Path:
    """The same graph, its caches outside of attention, beside it."""
    model = onnx.load(tiny_graph, load_external_data=False)
    assert split_caches(model) == 6
    path = tiny_graph.with_name("split.onnx")
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path


@pytest.fixture
def genai_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of `ort_genai` run here and not in two new processes for each export.

    What they compute is the same, and starting them costs four times as much: they import torch,
    transformers and the builder. As processes they run in `test_a_directory_for_onnxruntime_genai`
    and `test_a_failed_build_says_why`. What they change for good is put back here.
    """
    from onnxruntime_genai.models import builder
    from transformers import AutoModelForCausalLM

    def run(program: str, request: Mapping[str, Any], work: Work, follow: Any) -> None:
        del work, follow
        main = importlib.import_module(f"prune_export.exporters.ort_genai.{program}").main
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GIT_DIR", os.devnull)
            for owner, name in (
                (AutoModelForCausalLM, "from_pretrained"),
                (builder.Model, "make_inputs_and_outputs"),
            ):
                patch.setattr(owner, name, getattr(owner, name))
            main(json.loads(json.dumps(request)))

    monkeypatch.setattr("prune_export.exporters.ort_genai.exporter._run", run)
