"""What every method owes an exporter: the engine computes what PyTorch computes of its model.

All pairs of a method and a family take half an hour, so by default each method meets two
families and each family several methods; `--all-pairs` runs the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.arch.table import tables
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.exporters.onnx import Onnx
from prune_export.pruning.width.width_method import WidthMethod
from prune_export.surgery import rewrite
from tests.contracts.made import MACHINE, an_instance, view_for
from tests.exporters.onnx.test_onnx import error, expected_logits, exported, padded, stepped

METHODS = registry.names("methods")
FAMILIES = sorted(tables())
UNTRACEABLE = {"bloom", "falcon", "gptj"}
SOME = {
    (name, FAMILIES[(3 * at + k * 7) % len(FAMILIES)])
    for at, name in enumerate(METHODS)
    for k in range(2)
}


def shapes_that_differ(name: str) -> Any:
    """Widths that differ by block, where a method can: the harder case for an exporter."""
    cls = registry.find("methods", name)
    if issubclass(cls, WidthMethod):
        protect = {k: 0 for k in cls.__dataclass_fields__ if k.startswith("protect_")}
        return cls(ffn=0.5, heads=0.5, per_layer=True, **protect)
    return an_instance(cls)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(name, model_type) for name in METHODS for model_type in FAMILIES]
    if not metafunc.config.getoption("--all-pairs"):
        pairs = [pair for pair in pairs if pair in SOME]
    metafunc.parametrize(("name", "model_type"), pairs)


def test_an_engine_computes_what_pytorch_computes(
    name: str, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    for make in (shapes_that_differ, lambda name: an_instance(registry.find("methods", name))):
        try:
            method = make(name)
            method.predict(arch)
            break
        except PlanError:
            continue
    else:
        return  # refused for this family, in words that the contract of methods reads
    if model_type in UNTRACEABLE:
        with pytest.raises(PlanError, match=r"torch\.export cannot follow"):
            Onnx().check(arch, MACHINE)
        return
    decision = method.decide(view_for(method, checkpoint, tmp_path))
    rewrite(checkpoint, arch, decision.edits, tmp_path / "out", ram_bytes=1 << 30)
    exported(Onnx(), tmp_path / "out", tmp_path / "onnx")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(tmp_path / "onnx", MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(model, ids, mask), mask) < 1e-5
