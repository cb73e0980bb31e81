"""What every width method owes: what it removes is gone as if it had been silenced, no more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from prune_export import registry
from prune_export.arch.table import tables
from prune_export.calibrate import ExtraPass, ModelView
from prune_export.calibrate.streaming.linear_groups import as_matrix
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.pruning.width.width_method import WidthMethod
from prune_export.surgery import Overwrite, rewrite
from tests.arch.kinds import one_of_each
from tests.arch.tiny_models import PROMPT
from tests.contracts.made import plain_view
from tests.contracts.refused import WHOLE_HEADS, refuses

METHODS = [
    n for n in registry.names("methods") if issubclass(registry.find("methods", n), WidthMethod)
]


def method_for(name: str, checkpoint: Checkpoint, **keys: Any) -> Any:
    """The method on channels and, where the family's config can say it, heads."""
    if checkpoint.config["model_type"] not in WHOLE_HEADS:
        keys["heads"] = 0.5
    return registry.find("methods", name)(ffn=0.5, **keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_heads_are_refused_for_these_families_and_no_others(
    name: str, tiny: Callable[[str], Checkpoint]
) -> None:
    refused = set()
    for model_type in tables():
        try:
            registry.find("methods", name)(heads=0.5).predict(tiny(model_type).arch())
        except PlanError:
            refused.add(model_type)
    assert refused == WHOLE_HEADS


def silenced(checkpoint: Checkpoint, removed: dict[str, list[int]], out: Path) -> Any:
    """The whole model, with zeros where a removed unit enters a projection back."""
    arch = checkpoint.arch()
    state = {name: checkpoint.read(name) for name in checkpoint.entries}
    for tensor in arch.tensors:
        axis = {
            "down": f"mlp.{tensor.layer}",
            "expert.down": f"moe.{tensor.layer}.{tensor.expert}",
            "shared.down": f"shared.{tensor.layer}",
            "o": f"kv.{tensor.layer}",
        }.get(tensor.role, "")
        if axis in removed:
            run = arch.sizes["dim"] if tensor.role == "o" else 1
            for unit in removed[axis]:
                as_matrix(tensor, state[tensor.name])[:, unit * run : (unit + 1) * run] = 0
    out.mkdir()
    save_file({n: v.contiguous() for n, v in state.items()}, out / "model.safetensors")
    (out / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())
    return loaded(out)


def loaded(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        (name, family)
        for at, name in enumerate(METHODS)
        for turn, family in enumerate(one_of_each(at))
        if turn % 3 == at % 3 and not refuses(name, family)
    ],
)
def test_a_cut_model_computes_as_the_whole_one_silenced(
    name: str, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Each kind of family meets one or two of the methods, whose edits are made by one function."""
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    method = method_for(name, checkpoint, compensate=False)
    decision = method.decide(plain_view(checkpoint, tmp_path / "scratch"))
    cut = rewrite(checkpoint, arch, decision.edits, tmp_path / "cut", ram_bytes=1 << 30)
    predicted = method.predict(arch)
    assert {t.name: predicted.shape(t) for t in predicted.stored()} == {
        stored: entry.shape for stored, entry in cut.entries.items()
    }
    assert cut.arch().parameters() < arch.parameters()
    removed = decision.log["removed"]
    expected = logits(silenced(checkpoint, removed, tmp_path / "silenced"))
    assert (expected - logits(loaded(checkpoint.path))).abs().max() > 1e-2
    smaller = loaded(tmp_path / "cut")
    torch.testing.assert_close(logits(smaller), expected, atol=5e-4, rtol=1e-3)
    # And with a KV cache it generates what it says without one.
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, plain = (smaller.generate(PROMPT, use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("model_type", ["gpt2", "phi3"])
@pytest.mark.parametrize("name", METHODS)
def test_refitted_and_cut_is_refitted_and_silenced(
    name: str, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """The overwritten projections alone, in the whole model, are already the cut one."""
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    method = method_for(name, checkpoint, compensate=True)
    edits = list(method.decide(plain_view(checkpoint, tmp_path / "scratch")).edits)
    rewrite(checkpoint, arch, edits, tmp_path / "cut", ram_bytes=1 << 30)
    whole = [edit for edit in edits if isinstance(edit, Overwrite)]
    rewrite(checkpoint, arch, whole, tmp_path / "whole", ram_bytes=1 << 30)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "cut")),
        logits(loaded(tmp_path / "whole")),
        atol=5e-4,
        rtol=1e-3,
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", METHODS)
def test_widths_that_differ_by_block_are_stored_as_zeros(
    name: str, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    cls = registry.find("methods", name)
    protect = {f.name: 0 for f in dataclasses.fields(cls) if f.name.startswith("protect_")}
    method = cls(ffn=0.5, heads=0.5, per_layer=True, compensate=False, **protect)
    decision = method.decide(plain_view(checkpoint, tmp_path / "scratch"))
    wide = rewrite(checkpoint, arch, decision.edits, tmp_path / "wide", ram_bytes=1 << 30)
    assert wide.arch().sizes == method.predict(arch).sizes == arch.sizes
    removed = decision.log["removed"]
    for kind, size in (("mlp", arch.sizes["mlp.0"]), ("kv", 4)):
        gone = sum(len(units) for axis, units in removed.items() if axis.startswith(kind))
        assert gone == arch.layers * size // 2
    expected = logits(silenced(checkpoint, removed, tmp_path / "silenced"))
    torch.testing.assert_close(logits(loaded(tmp_path / "wide")), expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_announced_exactly_where_states_are_read(
    name: str, tiny: Callable[[str], Checkpoint]
) -> None:
    checkpoint = tiny("llama")
    arch = checkpoint.arch()
    method = registry.find("methods", name)(ffn=0.5, compensate=False)
    asked = method.statistics(arch)
    assert all(isinstance(one, ExtraPass) for one in asked)
    blind = ModelView(arch, checkpoint, {})
    if asked:
        with pytest.raises(ValueError, match="no calibration data"):
            method.decide(blind)
    else:
        assert list(method.decide(blind).edits)
