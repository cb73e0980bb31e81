"""Requests and texts that a model has no positions for are refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.cli.comparing import compared
from prune_export.cli.engines import verified
from prune_export.errors import PlanError
from prune_export.execution import Options, plan
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe
from prune_export.recipe.stages import Workload
from tests.arch.tiny_models import random_model

MACHINE = Machine("cpu", 4 << 30, 0, 1)
POSITIONS = 64
LATENCY = {"target": {"speedup": 1.2, "workload": {"prompt": 60, "new": 5}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in found:
            found[family] = tmp_path_factory.mktemp("models") / family
            random_model(family, {}, found[family])
        return found[family]

    return get


def planned(model: Path, options: Options, **body: Any) -> Any:
    whole = {"recipe": 1, "export": [{"onnx": {}}], **body}
    return plan(Recipe.parse(yaml.safe_dump(whole), root=model), str(model), options)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", MACHINE)


def speed(prompt: int, new: int, **more: Any) -> dict[str, Any]:
    return {"speed": {"workloads": [{"prompt": prompt, "new": new}], **more}}


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_model_has_as_many_positions_as_it_learned(
    family: str, made: Callable[[str], Path], options: Options
) -> None:
    """The last that is allowed is what the model itself takes: OPT's table has two rows more."""
    assert planned(made(family), options, verify=speed(60, 4)).stages
    with pytest.raises(PlanError) as caught:
        planned(made(family), options, verify=speed(60, 5))
    assert caught.value.where == "verify.speed.workloads.0"
    assert f"but the model has {POSITIONS} positions" in caught.value.problem
    model = AutoModelForCausalLM.from_pretrained(made(family))
    with torch.no_grad():
        model(torch.ones(1, POSITIONS, dtype=torch.long))
        with pytest.raises(IndexError):
            model(torch.ones(1, POSITIONS + 1, dtype=torch.long))


def test_every_phase_is_looked_at(made: Callable[[str], Path], options: Options) -> None:
    sweep = {"sweep": {"prompt": [8, 61], "new": 4}}
    with pytest.raises(PlanError, match=r"verify\.speed\.sweep\.prompt"):
        planned(made("gpt2"), options, verify=speed(8, 4, **sweep))
    with pytest.raises(PlanError, match=r"stages\.0\.prune\.ziplm\.target\.workload"):
        planned(
            made("opt"), options,
            data={"calibration": {"files": ["config.json"], "samples": 1, "length": 16}},
            stages=[{"prune": {"method": "ziplm", **LATENCY}}],
        )  # fmt: skip


def test_rotary_positions_are_advice_but_an_engine_may_have_its_own(
    made: Callable[[str], Path], options: Options
) -> None:
    llama = made("llama")
    assert planned(llama, options, verify=speed(300, 20)).stages
    with pytest.raises(PlanError, match="its engine takes 4096"):
        planned(
            llama, options, verify=speed(4090, 20),
            export=[{"onnx": {"provider": "cpu"}}, {"tensorrt": {}}],
        )  # fmt: skip
    genai = registry.find("exporters", "ort_genai")()
    assert genai.longest({"max_position_embeddings": 64}) == 64


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_compare_and_verify_refuse_before_they_start(
    family: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    model = made(family)
    with pytest.raises(PlanError, match="asks for 300 tokens and 32 new ones"):
        compared(
            [model, model], ["pytorch"], [], workload=Workload(1, 300, 32), minutes=0.1,
            trust=False, store=tmp_path, machine=MACHINE, progress=Silent(),
        )  # fmt: skip
    (text := tmp_path / "some.txt").write_text("words " * 99, encoding="utf-8")
    with pytest.raises(PlanError, match="is 65, but the model has 64 positions"):
        verified(
            model, [text], samples=1, length=65, trust=False, store=tmp_path, machine=MACHINE,
            progress=Silent(),
        )  # fmt: skip
