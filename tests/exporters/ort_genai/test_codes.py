"""The codes of a quantized checkpoint reach onnxruntime-genai's graph as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from transformers import AutoModelForCausalLM

from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids, write_grids
from prune_export.exporters._shared.nbits import packed_codes, packed_zeros, unpacked
from prune_export.exporters.ort_genai import OrtGenai
from prune_export.exporters.ort_genai.codes import LostCodesError, refuse_lost
from prune_export.grids import nearest_grid
from prune_export.quantize.gptq import Gptq
from prune_export.quantize.rtn import Rtn
from prune_export.surgery import rewrite
from tests.exporters.ort_genai.test_ort_genai import (
    MACHINE,
    export,
    logits_of,
    model_in,
    some_ids,
)


def quantized(source: Path, out: Path, method: Gptq | Rtn) -> Checkpoint:
    opened = Checkpoint.open(source)
    tokens = TokenSet.of(torch.from_numpy(some_ids(4, 24) % opened.arch().sizes["vocab"]))
    view = ModelView(
        opened.arch(), opened, {}, CalibrationContext(tokens, MACHINE, out.parent / "scratch")
    )
    found = method.decide(view)
    after = rewrite(opened, opened.arch(), found.edits, out, ram_bytes=1 << 30)
    write_grids(out, found.grids)
    return after


CASES: dict[str, tuple[str, dict[str, Any], Gptq | Rtn]] = {
    "tied, asymmetric": ("Llama", {"tie_word_embeddings": True}, Gptq(group_size=16)),
    "untied, symmetric, odd sizes": (
        "Llama",
        {"hidden_size": 72, "head_dim": 16, "intermediate_size": 100, "attention_bias": True},
        Gptq(symmetric=True),
    ),
    "fused, some left": ("Phi3", {"original_max_position_embeddings": 512}, Rtn(exclude=("o",))),
    "8 bits": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, Rtn(bits=8)),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if "tied, a" in c else pytest.mark.slow) for c in CASES]
)
@pytest.mark.usefixtures("genai_in_this_process")
def test_the_engine_computes_what_the_checkpoint_does(case: str, tmp_path: Path) -> None:
    family, keys, method = CASES[case]
    model_in(tmp_path / "dense", family, keys)
    after = quantized(tmp_path / "dense", tmp_path / "codes", method)
    precision = "int4" if method.bits == 4 else "int8"
    exporter = OrtGenai(precision=precision, accuracy_level=1, logits="all")  # type: ignore[arg-type]
    record = export(exporter, after.path, tmp_path / "engine")
    grids = Grids.of(after)
    assert grids is not None
    assert refuse_lost(tmp_path / "engine" / record.graph, after, grids) == len(list(grids))
    model = AutoModelForCausalLM.from_pretrained(after.path).eval()
    with torch.no_grad():
        rounded = nearest_grid(model.lm_head.weight, 8, 32, symmetric=True)
        head = rounded.values(rounded.codes(model.lm_head.weight))
        if method.bits == 4:
            model.lm_head.weight.copy_(head)
        else:  # the embedding stays as it is, tied or not
            model.lm_head.weight = torch.nn.Parameter(head)
        for tensor in grids.checkpoint.arch().stored():
            if tensor.role in (method.exclude or ()):  # which has no codes
                weight = model.get_parameter(tensor.name)
                grid = nearest_grid(weight, method.bits, 32, symmetric=True)
                weight.copy_(grid.values(grid.codes(weight)))
    ids = some_ids(1, 9)
    with exporter.open(tmp_path / "engine", MACHINE) as runner:
        got, _ = runner.step(ids)
    wanted = logits_of(model, ids)
    assert np.abs(got - wanted).max() < 1e-3 * np.abs(wanted).max()
    config = json.loads((tmp_path / "engine" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("genai_in_this_process")
def test_a_graph_with_other_weights_is_told(tmp_path: Path) -> None:
    model_in(tmp_path / "dense", "Llama", {"num_hidden_layers": 1})
    after = quantized(tmp_path / "dense", tmp_path / "codes", Rtn())
    other = quantized(tmp_path / "dense", tmp_path / "other", Rtn(symmetric=True))
    export(OrtGenai(precision="int4"), after.path, tmp_path / "engine")
    grids = Grids.of(other)
    assert grids is not None
    with pytest.raises(LostCodesError, match=r"\.weight is not in the graph"):
        refuse_lost(tmp_path / "engine" / "model.onnx", other, grids)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 72, 100])
def test_codes_are_packed_as_the_runtime_reads_them(
    width: int, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    """Against the runtime itself: a node with these bytes multiplies with these weights."""
    from onnxruntime import InferenceSession

    matrix = torch.randn(48, width, generator=torch.Generator().manual_seed(0))
    grid = nearest_grid(matrix, bits, 32, symmetric=symmetric)
    codes = grid.codes(matrix)
    zeros = packed_zeros(grid)
    held = {"codes": packed_codes(codes, grid).numpy(), "scales": grid.scales.numpy()}
    held |= {"zeros": zeros.numpy()} if zeros is not None else {}
    given = {"K": width, "N": 48, "bits": bits, "block_size": 32}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", accuracy_level=1, **given
    )
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node], "one", [info("x", kind, [width, width])], [info("y", kind, [width, 48])],
        [onnx.numpy_helper.from_array(value, name) for name, value in held.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(width, dtype=np.float32)})
    np.testing.assert_allclose(found.T, grid.values(codes).numpy(), atol=1e-6)
    read = unpacked(held["codes"], held["scales"], held.get("zeros"), given)
    assert np.array_equal(read, grid.values(codes).numpy())
    assert to_array(model.graph.initializer[0]).shape == held["codes"].shape
