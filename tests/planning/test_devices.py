"""Plans for devices that are not here, and for several processes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from prune_export.cli import main
from prune_export.execution import Options, plan
from prune_export.machine import Machine
from prune_export.planning import Devices, Plan
from prune_export.recipe import Recipe
from prune_export.units import GIB

ROOT = Path(__file__).parents[2]
PAGE: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "device_plans.py"))


def heal_of(planned: Plan) -> Any:
    return next(stage for stage in planned.stages if stage.kind == "heal")


def test_the_plans_on_the_page_are_up_to_date() -> None:
    text = PAGE["PAGE"].read_text(encoding="utf-8")
    assert PAGE["page"](text) == text, "run `python docs/device_plans.py`"


@pytest.mark.parametrize(
    ("model", "parameters", "left"),
    [("Llama-3.1-70B", 70_553_706_496, 48), ("Llama-3.1-405B", 405_853_388_800, 76)],
)
def test_a_model_that_is_only_a_config_has_its_published_shapes(
    model: str, parameters: int, left: int
) -> None:
    planned = PAGE["planned"](model, "qlora", 8, 80)
    assert planned.stages[0].before.parameters == parameters
    assert planned.stages[0].after.layers == left
    assert planned.machine.device == "cuda"
    assert planned.devices == Devices(8, bytes=80 * GIB)


def test_more_devices_take_less_time_and_the_same_memory() -> None:
    one, eight, many = (
        heal_of(PAGE["planned"]("Llama-3.1-70B", "qlora", count, 80)) for count in (1, 8, 1000)
    )
    assert eight.cost.flops == pytest.approx(one.cost.flops / 8)
    assert eight.cost.gpu_bytes == one.cost.gpu_bytes
    assert "in 8 processes" in eight.note
    # A step has 64 windows: no more can take part.
    assert many.cost.flops == pytest.approx(one.cost.flops / 64)
    assert "in 1000 processes, of which 64 have a part in a step" in many.note


def test_what_a_device_cannot_hold_is_refused_by_stage() -> None:
    planned = PAGE["planned"]("Llama-3.1-70B", "lora", 8, 80)
    (error,) = planned.lacking
    # 43.2 billion parameters in bfloat16 alone are 80 GiB.
    assert error.where == "heal lora"
    assert "80.00 GiB are there" in error.problem
    assert "qlora" in error.fix
    assert not PAGE["planned"]("Llama-3.1-70B", "qlora", 8, 80).lacking


RECIPE = """\
recipe: 1
data: {healing: {files: [healing.jsonl], samples: 16, length: 32}}
stages:
  - prune: {method: deepest, remove: 2}
  - heal: {method: lora, rank: 2, steps: 3, batch: 4}
verify: {generation: false}
"""


def test_processes_on_one_machine_each_need_memory(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    recipe = Recipe.parse(RECIPE, root=corpus)

    def planned(devices: Devices | None, ram: int) -> Plan:
        machine = Machine("cpu", ram, 0, 2)
        options = Options(tmp_path / "out", tmp_path / "store", machine, devices=devices)
        return plan(recipe, str(tiny_llama), options)

    alone, two = (planned(one, 8 * GIB) for one in (None, Devices(2, here=2)))
    assert heal_of(two).cost.ram_bytes == 2 * heal_of(alone).cost.ram_bytes
    assert heal_of(two).cost.flops == heal_of(alone).cost.flops / 2
    enough = GIB  # for one: Python and torch are most of what a tiny model needs
    assert not [error for error in planned(None, enough).lacking if "memory" in error.problem]
    lacking = planned(Devices(2, here=2), enough).lacking
    assert any("heal lora" in error.where for error in lacking)


def command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["prune-export", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_command_plans_for_devices(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PAGE["MODELS"]["Llama-3.1-70B"]))
    (corpus / "devices.yaml").write_text(RECIPE, encoding="utf-8")
    asked = [str(corpus / "devices.yaml"), "-m", str(tmp_path), "--devices", "4"]
    elsewhere = [*asked, "--device-memory", "96GiB", "--device-tflops", "400"]
    status, out, err = command([*elsewhere, "--json"], monkeypatch, capsys)
    # 78 blocks in bfloat16 are more than a device's 96 GiB; RAM and disk of this machine are not
    # asked for.
    assert status == 2, err
    found = json.loads(out)
    assert found["devices"] == {"count": 4, "here": 1, "bytes": 96 * GIB, "flops": 4e14}
    assert [line.partition(":")[0] for line in found["lacking"]] == ["heal lora"]
    status, out, err = command(elsewhere, monkeypatch, capsys)
    assert status == 2
    assert "each device" in out
    assert "on 4 devices at 400 TFLOP/s each" in " ".join(out.split())
    for wrong, words in (
        (["--device-memory", "much"], "--device-memory"),
        (["--device-tflops", "100"], "whose memory is not given"),
    ):
        status, _, err = command([*asked, *wrong], monkeypatch, capsys)
        assert status == 2
        assert words in err
