"""`doctor`: what is there, what is missing for what, and the command that adds it."""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from prune_export import doctor
from prune_export.cli import main
from prune_export.doctor import PURPOSES, diagnose
from prune_export.machine import cpu_features

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "x" * 30


def test_every_extra_that_users_have_says_what_it_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(PURPOSES) == set(project["optional-dependencies"]) - {"all", "dev", "docs"}


def test_the_command_prints_json_and_no_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["prune-export", "doctor", "--json", "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert ended.value.code == 0
    assert found["ok"]
    assert found["hub"]["logged_in"] is True
    assert TOKEN not in shown
    assert found["disks"][0]["free_bytes"] > 0
    assert "CPUExecutionProvider" in found["providers"]
    assert {"aoti", "onnx", "ort_genai", "tensorrt"} <= found["exporters"].keys()
    extras = {one["name"]: one for one in found["extras"]}
    assert extras["onnx"]["ok"]
    missing = {one["what"]: one for one in found["missing"]}
    for one in extras.values():
        assert one["ok"] == (one["purpose"] not in missing)
        if not one["ok"]:
            assert (
                missing[one["purpose"]]["command"] == f'pip install "prune-export[{one["name"]}]"'
            )


def test_the_table_names_each_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prune-export", "doctor"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in doctor._extras())
    assert "memory" in shown


def test_a_package_is_there_in_the_version_wanted_or_not_ok() -> None:
    absent = doctor._package(Requirement("no-such-distribution-of-ours>=2"))
    old = doctor._package(Requirement("numpy>=99"))
    fine = doctor._package(Requirement("numpy>=2"))
    assert (absent.ok, absent.version) == (False, "")
    assert (old.ok, bool(old.version)) == (False, True)
    assert fine.ok
    assert doctor._lacking((absent, old, fine)).startswith(
        "no-such-distribution-of-ours >=2: is not installed; numpy >=99: 2."
    )


def test_extras_of_other_packages_are_looked_into() -> None:
    assert doctor._package(Requirement("prune-export[data]")).ok
    inner = list(doctor._requirements("prune-export"))
    assert not doctor._applies(next(r for r in inner if r.name == "ray"), "")


def test_instruction_sets_are_those_that_the_system_lists() -> None:
    file = Path("/proc/cpuinfo")
    if not file.exists():
        pytest.skip("this system does not say")
    assert set(cpu_features()) <= set(file.read_text(encoding="utf-8").split())
    assert cpu_features()


@pytest.mark.gpu
def test_a_gpu_is_described(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (first, *_) = diagnose(tmp_path).gpus
    major, minor = torch.cuda.get_device_capability(0)
    assert first.capability == f"{major}.{minor}"
    assert first.sparse_tensor_cores == (major >= 8)
    assert 0 < first.free_bytes <= first.memory_bytes
    assert dataclasses.asdict(first)
