"""Every depth method on every family: what it refits at the seams of its cut, what it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export import registry
from prune_export.calibrate import LINEAR_GROUPS, ModelView, added_times
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Decision, Refitting
from prune_export.errors import PlanError
from prune_export.pruning.depth import seam_refit
from prune_export.surgery import Overwrite, rewrite
from tests.arch.kinds import one_of_each
from tests.contracts.made import an_instance, plain_view, units_of, view_for

DEPTH = [
    (name, unit)
    for name in registry.names("methods")
    if issubclass(registry.find("methods", name), seam_refit.Refits)
    for unit in units_of(registry.find("methods", name))
]


def bytes_of(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.suffix == ".safetensors"
    }


def written(checkpoint: Checkpoint, decision: Decision, out: Path) -> dict[str, str]:
    rewrite(checkpoint, checkpoint.arch(), decision.edits, out, ram_bytes=1 << 30)
    return bytes_of(out)


def test_every_depth_method_refits() -> None:
    names = {name for name, _ in DEPTH}
    assert names == {"angular_distance", "block_influence", "deepest", "every_other", "greedy_loss",
                     "laco", "perplexity", "taylor"}  # fmt: skip
    methods = [an_instance(registry.find("methods", name)) for name in names]
    assert all(isinstance(method, Refitting) for method in methods)


# Every method of every family refits in `test_methods.py`; here, one method and one family each.
PAIRS = [("deepest", None, model_type) for model_type in one_of_each(2)]
PAIRS += [(name, unit, "llama") for name, unit in DEPTH if (name, unit) != ("deepest", None)]
PAIRS += [("block_influence", unit, "phi") for unit in ("attention", "mlp")]


@pytest.mark.parametrize(("name", "unit", "model_type"), PAIRS)
def test_refits_come_beside_the_same_cut(
    name: str, unit: str | None, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """With `refit: false` the edits are those of the cut alone, which the refits leave as it is."""
    checkpoint = tiny(model_type)
    method = an_instance(registry.find("methods", name), unit)
    off = dataclasses.replace(method, refit=False)
    for scratch in ("off", "auto"):
        (tmp_path / scratch).mkdir()
    plain = off.decide(view_for(off, checkpoint, tmp_path / "off"))
    assert "refit" not in plain.log
    assert off.passes_with_data(checkpoint.arch()) == ()
    found = method.decide(view_for(method, checkpoint, tmp_path / "auto"))
    log = found.log["refit"]
    json.dumps(log)
    decided = {key: value for key, value in found.log.items() if key != "refit"}
    assert decided == plain.log
    if added_times(checkpoint.arch()) is None:
        assert (log["taken"], log["why"]) == (False, f"a {checkpoint.arch().family} model "
                                              "normalizes or turns what is added to its residual "
                                              "states")  # fmt: skip
        with pytest.raises(PlanError, match="refit"):
            dataclasses.replace(method, refit=True).passes_with_data(checkpoint.arch())
    if not log["taken"]:
        assert log["why"]
        assert len(list(found.edits)) == len(list(plain.edits))
        return
    before, after = log["held_out_loss"]
    assert after < before
    for seam in log["seams"]:
        assert seam["state_error"][1] <= seam["state_error"][0]
    refitted = [seam["projection"] for seam in log["seams"] if seam["ridge"] is not None]
    own = {edit.tensor for edit in plain.edits if isinstance(edit, Overwrite)}
    new = {edit.tensor for edit in found.edits if isinstance(edit, Overwrite)}
    roles = {checkpoint.arch().by_name[one].role.removesuffix(".bias") for one in new - own}
    assert new >= {*own, *refitted}
    assert {LINEAR_GROUPS[role] for role in roles} <= {"attention.out", "mlp.out"}


@pytest.mark.parametrize(("name", "unit"), DEPTH)
def test_a_demanded_refit_is_the_same_each_time(
    name: str, unit: str | None, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny("llama")
    method = dataclasses.replace(an_instance(registry.find("methods", name), unit), refit=True)
    made = []
    for number in range(2):
        (tmp_path / f"scratch-{number}").mkdir()
        view = view_for(method, checkpoint, tmp_path / f"scratch-{number}")
        decision = method.decide(view)
        made.append(written(checkpoint, decision, tmp_path / f"out-{number}"))
    assert made[0] == made[1]


def test_zeros_of_earlier_stages_stay(tiny: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """A 2:4 pattern in every projection, and a whole one that is silent."""
    checkpoint = tiny("llama")
    arch = checkpoint.arch()

    def halved(name: str) -> torch.Tensor:
        value = checkpoint.read(name).clone()
        value[:, 0::4] = 0
        value[::2, 1::4] = 0
        value[1::2, 2::4] = 0
        return value

    edits = [
        Overwrite(tensor.name, lambda name=tensor.name: halved(name))
        for tensor in arch.tensors
        if tensor.role in ("o", "down")
    ]
    rewrite(checkpoint, arch, edits, tmp_path / "sparse", ram_bytes=1 << 30)
    sparse = Checkpoint.open(tmp_path / "sparse")
    method = registry.find("methods", "deepest")(layers=(2, 3), refit=True)
    decision = method.decide(plain_view(sparse, tmp_path / "scratch"))
    (seam,) = decision.log["refit"]["seams"]
    assert seam["projection"] == "model.layers.1.mlp.down_proj.weight"
    if decision.log["refit"]["taken"]:
        (edit,) = (edit for edit in decision.edits if isinstance(edit, Overwrite))
        old, new = sparse.read(edit.tensor), edit.value()
        assert not torch.equal(old, new)
        assert not bool(new[old == 0].any())


@pytest.mark.parametrize("name", ["deepest", "every_other", "angular_distance"])
def test_without_data_it_says_that_nothing_is_refitted(
    name: str, tiny: Callable[[str], Checkpoint]
) -> None:
    checkpoint = tiny("llama")
    method: Any = registry.find("methods", name)(layers=(2, 3))
    decision = method.decide(ModelView(checkpoint.arch(), checkpoint, {}))
    assert decision.log["refit"] == {"taken": False, "why": "the stage has no calibration data"}


def test_a_seam_with_nothing_before_it_is_left(
    tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny("llama")
    method = registry.find("methods", "deepest")(layers=(0, 3), refit=True)
    log = method.decide(plain_view(checkpoint, tmp_path / "some")).log["refit"]
    assert log["left"] == [{"removed": [0], "why": "no projection stands before it"}]
    assert [seam["block"] for seam in log["seams"]] == [2]
    method = registry.find("methods", "deepest")(layers=(0, 1), refit=True)
    log = method.decide(plain_view(checkpoint, tmp_path / "none")).log["refit"]
    assert (log["taken"], log["why"]) == (False, "no projection stands before it")
