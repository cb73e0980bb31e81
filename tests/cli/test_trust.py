"""Engines that hold machine code are opened only if the store made them, or the user says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prune_export.cli.engines import _engines
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
    trusted = {name: one.trusted for name, one in _engines(result, False, tmp_path / "s").items()}
    assert trusted == {"onnx": False, "tensorrt": False}
    assert _engines(result, True, tmp_path / "s")["tensorrt"].trusted


def test_what_the_store_made_is_trusted(result: Path, tmp_path: Path) -> None:
    def build(files: Path, scratch: Path) -> dict[str, str]:
        (files / "model.engine").write_bytes(b"a stranger's")
        return {}

    Store(tmp_path / "s").make(Key("export", "tensorrt", "1", {}), build)
    assert _engines(result, False, tmp_path / "s")["tensorrt"].trusted
