"""Traces are alike in processes that order sets of text in different ways."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from torch import nn

from prune_export.exporters._shared.repeatable import sets_in_order

GRAPH = """
import hashlib, torch
from transformers import AutoConfig
from prune_export.arch.table import table_for
from prune_export.exporters.onnx.trace import trace
ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
config = AutoConfig.for_model("gemma3_text", **{**ends, **table_for("gemma3_text").tiny.config})
blocks = "model.layers"
graph = trace(config, torch.float32, blocks, last=False).model.graph
names = [(node.op_type, [v.name for v in (*node.inputs, *node.outputs) if v]) for node in graph]
print(hashlib.sha256(repr(names).encode()).hexdigest())
"""


@pytest.mark.slow
def test_a_graph_does_not_depend_on_the_seed_of_hashes() -> None:
    """Gemma 3 walks the set of its kinds of attention while it computes."""
    found = set()
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", GRAPH],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.split()[-1])
    assert len(found) == 1


def test_sets_are_walked_in_order_within_and_as_before_after() -> None:
    module = _Walks()
    with sets_in_order(module):
        assert module.walked() == ["a", "b", "c", "d"]
    assert "set" not in globals()


class _Walks(nn.Module):
    def walked(self) -> list[str]:
        return [*set("dbca")]
