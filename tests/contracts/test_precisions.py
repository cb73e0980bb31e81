"""What `onnx` owes every family in every precision: a graph that loads and computes the same.

ONNX Runtime has no bfloat16 kernels for the CPU, so bf16 graphs run in onnx's own evaluator. By
default a few families are met that have every role and every layout between them, in one precision
each: a family of which all is known already adds no row. `--all-pairs` runs each in each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import AutoConfig

from prune_export.arch.table import table_for, tables
from prune_export.exporters.onnx import Onnx
from tests.arch.kinds import covering, matrices_of, roles_of
from tests.contracts.made import MACHINE
from tests.exporters.onnx.graphs import (
    UNTRACEABLE,
    error,
    expected_logits,
    exported,
    padded,
    saved,
    stepped,
)

ALLOWED = {"fp32": 1e-5, "fp16": 3e-2, "bf16": 1e-1, "int8": 5e-1}
"""Largest error as a fraction of the largest logit; random models magnify every rounding."""

ROUTED = {("mixtral", "bf16"): 6e-1}
"""PyTorch's own bfloat16 is as far off, by 0.44: a rounding sends some tokens to other experts."""

SUMMED = {"bamba"}
"""Their states are sums over all tokens before, so that PyTorch's own bfloat16 is further off than
the bound of others; an engine may be a quarter further off than that."""

CHOSEN = {"num_experts_per_tok", "moe_topk", "moe_k"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NOT_JUDGED = {"phimoe"}
"""Its router drops experts at a threshold, and onnx's evaluator cannot run it in bf16."""

QUICK = {"gemma3_text": "bf16", "olmo2": "fp16", "qwen3_moe": "fp16"}
"""Each once was refused by the runtime."""

UNSTEADY = {("jamba", "int8")}
"""Its random blocks multiply three projections of one state, whose roundings by the runtime they
magnify; without these the export's own check finds them equal."""

TRACEABLE = sorted(tables().keys() - UNTRACEABLE - NOT_JUDGED)
STEADY = [family for family in TRACEABLE if (family, "int8") not in UNSTEADY]
HALVES = ("fp16", "bf16")
SOME: list[tuple[str, str]] = [
    *((family, HALVES[at % 2]) for at, family in enumerate(covering(TRACEABLE, roles_of))),
    *((family, "int8") for family in covering(STEADY, matrices_of)),
    ("gemma2", "fp16"),
]
"""Every role in a half precision, every layout of a matrix in int8; fp32 is in test_onnx.py."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "precision" not in metafunc.fixturenames:
        return
    pairs = [(family, precision) for family in TRACEABLE for precision in ALLOWED]
    pairs = [pair for pair in pairs if pair not in UNSTEADY]
    if not metafunc.config.getoption("--all-pairs"):
        pairs = [*QUICK.items(), *(pair for pair in SOME if pair not in QUICK.items())]
    metafunc.parametrize(("model_type", "precision"), pairs)


def evaluated(graph: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits of a prompt in bfloat16."""
    model = onnx.load(graph)
    fed: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
    }
    sizes = {"batch": len(ids), "past_sequence": 0}
    for entry in model.graph.input:
        if entry.name.startswith("past_key_values"):
            tensor = entry.type.tensor_type
            shape = [sizes.get(d.dim_param, d.dim_value) for d in tensor.shape.dim]
            kind = np.float32 if tensor.elem_type == onnx.TensorProto.FLOAT else ml_dtypes.bfloat16
            fed[entry.name] = np.zeros(shape, kind)
    named = {entry.name for entry in model.graph.input}
    (logits,) = ReferenceEvaluator(model).run(["logits"], {k: fed[k] for k in fed if k in named})
    return np.asarray(logits).astype(np.float32)


def all_experts(model_type: str) -> dict[str, Any]:
    """Lets tokens go to all experts of a mixture: a rounding can then send none elsewhere."""
    config = AutoConfig.for_model(model_type, **table_for(model_type).tiny.config)
    count = next((getattr(config, key) for key in EXPERTS if getattr(config, key, None)), None)
    chosen = {key: count for key in CHOSEN if count and getattr(config, key, None)}
    groups = getattr(config, "n_group", None)
    return chosen | ({"topk_group": groups} if chosen and groups else {})


@pytest.mark.slow
def test_a_family_computes_the_same_in_every_precision(
    model_type: str, precision: Any, tmp_path: Path
) -> None:
    changes = {} if model_type in ("mixtral", "qwen3_moe") else all_experts(model_type)
    model = saved(model_type, tmp_path / "dense", **changes)
    entry = Onnx(precision=precision)
    exported(entry, tmp_path / "dense", tmp_path / "onnx")
    ids, mask = padded(model.config.vocab_size)
    if precision == "bf16":
        got = evaluated(tmp_path / "onnx" / "model.onnx", ids, mask)
    else:
        with entry.open(tmp_path / "onnx", MACHINE) as runner:
            got = stepped(runner, ids, mask)
    expected = expected_logits(model, ids, mask)
    allowed = ROUTED.get((model_type, precision), ALLOWED[precision])
    if precision == "bf16" and model_type in SUMMED:
        half = type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
        allowed = 1.25 * error(expected_logits(half, ids, mask), expected, mask)
    assert error(got, expected, mask) < allowed
