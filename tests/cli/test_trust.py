"""Engines that hold machine code are opened only if the store made them, or the user says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prune_export.errors import CheckpointError
from prune_export.machine import Machine
from prune_export.results.opening import reported_engines
from prune_export.store import Key, Store


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A result directory with an engine of `onnx` and one of `tensorrt`."""
    report = json.loads(Path("tests/report/full.json").read_text(encoding="utf-8"))
    kept = dict(report["exports"][0])
    report["exports"] = [
        kept | {"exporter": "onnx", "directory": "onnx", "parameters": {}},
        kept | {"exporter": "tensorrt", "directory": "tensorrt", "parameters": {}},
    ]
    out = tmp_path / "out"
    for name in ("onnx", "tensorrt"):
        (out / name).mkdir(parents=True)
    (out / "tensorrt" / "model.engine").write_bytes(b"a stranger's")
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return out


def test_a_strangers_engine_is_not_trusted_unasked(result: Path, tmp_path: Path) -> None:
    trusted = {
        name: one.trusted for name, one in reported_engines(result, False, tmp_path / "s").items()
    }
    assert trusted == {"onnx": False, "tensorrt": False}
    assert reported_engines(result, True, tmp_path / "s")["tensorrt"].trusted


@pytest.mark.parametrize(
    ("key", "name"),
    [("directory", "../elsewhere"), ("directory", "/"), ("directory", ".hidden"),
     ("directory", "a/b"), ("directory", "x" * 300), ("graph", "../model.onnx")],
)  # fmt: skip
def test_a_report_names_engines_beside_itself_only(result: Path, key: str, name: str) -> None:
    (result.parent / "elsewhere").mkdir()
    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    report["exports"][0][key] = name
    (result / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"exports.0.{key}\n"):
        reported_engines(result, False, result.parent / "s")


@pytest.mark.parametrize("make", [os.mkfifo, lambda place: place.symlink_to("/dev/zero")])
def test_an_engine_with_a_pipe_or_a_device_in_it_is_not_opened(
    result: Path, make: Callable[[Path], None]
) -> None:
    make(result / "onnx" / "model.onnx")
    engine = reported_engines(result, False, result.parent / "s")["onnx"]
    with pytest.raises(CheckpointError, match=r"is a (pipe|device)"):
        engine.open(Machine.detect(device="cpu", threads=1))


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"search": 1, "model": {}}', '{"search": {"past_present_share_buffer": true}}',
     '{"search": {"past_present_share_buffer": 1}, "model": {"decoder": {"head_size": 2}}}',
     '{"search": {"past_present_share_buffer": true}, "model": {"decoder": {"head_size": {}}}}'],
)  # fmt: skip
def test_an_engines_configuration_is_checked(tmp_path: Path, text: str) -> None:
    from prune_export.exporters.ort_genai.runner import open_runner

    (tmp_path / "genai_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"genai_config\.json"):
        open_runner(tmp_path, Machine.detect(device="cpu", threads=1))


def test_what_the_store_made_is_trusted(result: Path, tmp_path: Path) -> None:
    def build(files: Path, scratch: Path) -> dict[str, str]:
        (files / "model.engine").write_bytes(b"a stranger's")
        return {}

    Store(tmp_path / "s").make(Key("export", "tensorrt", "1", {}), build)
    assert reported_engines(result, False, tmp_path / "s")["tensorrt"].trusted
