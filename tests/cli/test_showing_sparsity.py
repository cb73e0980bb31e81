"""`verify` prints who ran what, which patterns weights hold, and what is known of kernels."""

from __future__ import annotations

import pytest

from prune_export.cli.engines import show_verification
from prune_export.verify.results import Placed, Reload, Sparsity, Verification, WeightPattern


def test_nodes_patterns_and_kernels_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    weights = [WeightPattern("a", 8, 8, 0.5, "2 of 4"), WeightPattern("b", 8, 8, 0.0, "")]
    found = Verification(
        Reload(ok=True, model_type="llama", missing=[], unexpected=[], parameters=1, seconds=1.0),
        placement=[Placed("onnx", "CUDAExecutionProvider", {"CPUExecutionProvider": 7}, ["q"])],
        sparsity=[Sparsity("trt", weights, asked=True, proven=False, eligible=3, chosen=0)],
    )
    show_verification(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "onnx: CPUExecutionProvider 7" in printed
    assert "FAILED: 1 nodes that multiply were not run by CUDAExecutionProvider (q)" in printed
    assert "of 2 weights 1 hold 2 of 4" in printed
    assert "3 layers eligible but not picked" in printed
    assert not found.ok
