"""What every method owes an exporter: the engine computes what PyTorch computes of its model.

An exporter sees what was cut and not by whom. So by default one method of each sort (those of one
room with the same base classes make the same edits) is met once, by a family of another kind;
`--all-pairs` runs the whole table. Each family's graph is in tests/exporters/onnx, what a method
refuses in `refused.py`, and what each leaves reloads in test_methods.py.
"""

from __future__ import annotations

from collections import Counter
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
from tests.arch.kinds import kinds
from tests.contracts.made import MACHINE, an_instance, view_for
from tests.contracts.refused import WHOLE_HEADS, refuses
from tests.exporters.onnx.graphs import (
    UNTRACEABLE,
    error,
    expected_logits,
    exported,
    padded,
    stepped,
)

METHODS = registry.names("methods")
FAMILIES = sorted(tables())
PAIRS = [
    (name, model_type)
    for name in METHODS
    for model_type in FAMILIES
    if not refuses(name, model_type) and model_type not in UNTRACEABLE
]


def one_of_each_sort() -> list[str]:
    """Of methods with the same room and base classes, the one with the most keys."""
    sorts: dict[tuple[str, ...], list[str]] = {}
    for name in METHODS:
        cls = registry.find("methods", name)
        bases = (base.__qualname__ for base in cls.__mro__[1:])
        sorts.setdefault((cls.__module__.rpartition(".")[0], *bases), []).append(name)
    return [max(names, key=keys_of) for names in sorts.values()]


def keys_of(name: str) -> int:
    return len(registry.find("methods", name).__dataclass_fields__)


def cover() -> list[tuple[str, str]]:
    """A method of each sort with a family of a kind of its own; those of few families first."""
    able = {name: [family for one, family in PAIRS if one == name] for name in one_of_each_sort()}
    kind_of = {family: kind for kind in kinds() for family in kind}
    met: Counter[tuple[str, ...]] = Counter()
    chosen = []
    for at, name in enumerate(sorted(able, key=lambda name: (len(able[name]), name))):
        turned = able[name][2 * at % len(able[name]) :] + able[name]
        family = min(turned, key=lambda family: met[kind_of[family]])
        met[kind_of[family]] += 1
        chosen.append((name, family))
    return chosen


@pytest.mark.parametrize("model_type", sorted(UNTRACEABLE))
def test_what_cannot_be_traced_is_refused_in_the_plan(
    model_type: str, tiny: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(PlanError, match=r"torch\.export cannot follow"):
        Onnx().check(tiny(model_type).arch(), MACHINE)


def test_each_sort_of_method_is_met_by_another_kind_of_family() -> None:
    rooms = {registry.find("methods", name).__module__.split(".")[-2] for name, _ in cover()}
    assert rooms >= {"depth", "sparse", "width", "rotation", "latency"}
    assert sum(any(family in kind for _, family in cover()) for kind in kinds()) == len(cover())


def pruned_harder(name: str, model_type: str) -> Any:
    """Widths that differ by block, where a method can: the harder case for an exporter."""
    cls = registry.find("methods", name)
    if issubclass(cls, WidthMethod) and model_type not in WHOLE_HEADS:
        protect = {k: 0 for k in cls.__dataclass_fields__ if k.startswith("protect_")}
        return cls(ffn=0.5, heads=0.5, per_layer=True, **protect)
    return an_instance(cls)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        pairs = PAIRS if metafunc.config.getoption("--all-pairs") else cover()
        metafunc.parametrize(("name", "model_type"), pairs)


@pytest.mark.slow
def test_an_engine_computes_what_pytorch_computes(
    name: str, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    method = pruned_harder(name, model_type)
    decision = method.decide(view_for(method, checkpoint, tmp_path))
    rewrite(checkpoint, arch, decision.edits, tmp_path / "out", ram_bytes=1 << 30)
    exported(Onnx(), tmp_path / "out", tmp_path / "onnx")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(tmp_path / "onnx", MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(model, ids, mask), mask) < 1e-5
