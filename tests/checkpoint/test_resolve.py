from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune_export.checkpoint import resolve_model
from prune_export.errors import CheckpointError, PlanError
from tests.checkpoint.model_hub import COMMIT, Models, model_hub

CALLS = Path(__file__).parent / "resolve_calls.py"
ROOT = Path(__file__).parents[2]
SIDE = ["LICENSE", "config.json", "generation_config.json", "tokenizer.json"]


def test_a_directory_and_a_gguf_file_are_themselves(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"")
    assert resolve_model(str(tmp_path)) == (tmp_path, None)
    assert resolve_model(str(file)) == (file, None)


def test_a_home_directory_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == (tmp_path / "model", None)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the directory that holds"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "spec",
    [
        "./no",
        "/no/such",
        "~/no",
        "no.gguf",
        "a/b/c",
        "a b",
        "",
        "\0",
        "a\0b/c",
        "/" + "x" * 300,
        "~none/" + "y" * 300,
        "z/" * 2000,
    ],
)
def test_what_is_no_hub_id_is_not_looked_for_there(spec: str) -> None:
    with pytest.raises(PlanError, match="is not a Hub id"):
        resolve_model(spec)


def test_offline_says_so() -> None:
    with pytest.raises(PlanError, match="is not in the local cache") as caught:
        resolve_model("org/never-fetched")
    assert "hf download" in caught.value.fix


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from tests.saved_models import maker

    saved: Callable[..., Path] = maker(tmp_path_factory.mktemp)

    def files(path: Path, **more: bytes) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()} | more

    extra = {
        "README.md": b"card",
        "LICENSE": b"yours",
        "tokenizer.json": b"{}",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80",
        "original/consolidated.safetensors": b"again",
        "onnx/model.onnx": b"again",
    }
    config = files(saved("llama"))["config.json"]
    return {
        "org/one": files(saved("llama")) | extra,
        "org/many": files(saved("llama", shard="20KB")) | extra,
        "org/pickled": {"config.json": config, "pytorch_model.bin": b"\x80"},
        "org/quantized": {"README.md": b"card", "m-Q4_0.gguf": b"GGUF"},
        "org/empty": {"config.json": config},
        "org/adapted": files(saved("llama")) | {"adapter_config.json": b"{}"},
    }


def resolved(url: str, cache: Path, *calls: dict[str, Any], **environment: str) -> list[Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, str(CALLS)],
        input=json.dumps(calls),
        env=kept | {"HF_HOME": str(cache), "HF_ENDPOINT": url, "PYTHONPATH": str(ROOT)}
        | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_fetches_what_is_data_and_finds_it_again_offline(models: Models, tmp_path: Path) -> None:
    shards = [
        name for name in models["org/many"] if name.startswith("model") and "evil" not in name
    ]
    calls = [{"spec": "org/one"}, {"spec": "org/many"}, {"spec": f"org/one@{COMMIT}"}]
    with model_hub(models) as (url, fetched):
        online = resolved(url, tmp_path, *calls)
        count = len(fetched)
        again = resolved(url, tmp_path, *calls)
        assert len(fetched) == count
    one, many = sorted([*SIDE, "model.safetensors"]), sorted([*SIDE, *shards])
    assert [found["files"] for found in online] == [one, many, one]
    assert {found["revision"] for found in online} == {COMMIT}
    assert [found["tensors"] for found in online] == [57, 57, 57]
    assert again == online
    assert resolved("http://127.0.0.1:9", tmp_path, *calls, HF_HUB_OFFLINE="1") == online
    assert resolved("http://127.0.0.1:9", tmp_path, *calls) == online  # no network, no setting
    offline = [{**call, "offline": True} for call in calls]
    assert resolved("http://127.0.0.1:9", tmp_path, *offline) == online


def test_without_weights_none_is_fetched(models: Models, tmp_path: Path) -> None:
    with model_hub(models) as (url, fetched):
        (found,) = resolved(url, tmp_path, {"spec": "org/many@main", "weights": False})
    assert found == {"revision": COMMIT, "files": SIDE, "tensors": 0}
    assert sorted(fetched) == SIDE


REFUSALS = {
    "org/pickled": ("CheckpointError", "only pytorch_model.bin: pickles can run code"),
    "org/quantized": ("CheckpointError", "hf download org/quantized m-Q4_0.gguf"),
    "org/empty": ("CheckpointError", "has no weights"),
    "org/adapted": ("CheckpointError", "merge it first"),
    "org/gated": ("PlanError", "is gated"),
    "org/busy": ("PlanError", "cannot be fetched"),
    "org/nothing": ("PlanError", "is not found there, or is private"),
    "org/one@v2": ("PlanError", "has no such revision"),
    "org/--bad..name": ("PlanError", "is not a Hub id"),
}


def test_each_refusal_says_what_to_do(models: Models, tmp_path: Path) -> None:
    with model_hub(models) as (url, fetched):
        found = resolved(url, tmp_path, *({"spec": spec} for spec in REFUSALS))
        (down,) = resolved("http://127.0.0.1:9", tmp_path, {"spec": "org/one"})
    assert fetched == []
    for (spec, (kind, said)), outcome in zip(REFUSALS.items(), found, strict=True):
        assert outcome["error"] == kind, (spec, outcome)
        assert said in outcome["text"], (spec, outcome)
        assert outcome["fix"] or spec == "org/empty"
    assert "is not in the local cache" in down["text"]
