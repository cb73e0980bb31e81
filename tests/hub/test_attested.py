"""What is published may carry a bill of materials and a signature over all of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import MissingExtra, PublishError
from prune_export.hub.materials import bill_of_materials, write_bill
from prune_export.hub.signing import sign

HAS_SIGNING = importlib.util.find_spec("model_signing") is not None


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "onnx").mkdir(parents=True)
    lock = {
        "lock": 1, "recipe_sha256": "ab" * 32,
        "base": {"model": "SmolLM2-135M.gguf", "revision": None, "id": "import-1"},
        "data": {"calibration": {"id": "data-1", "fingerprint": "cd" * 32}},
        "artifacts": {"stages.0.prune": {"id": "prune-1", "files": {}}},
        "versions": {"prune_export": "0.1.0"},
    }  # fmt: skip
    (folder / "prune_recipe.lock.json").write_text(json.dumps(lock), encoding="utf-8")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    (folder / "private notes.txt").write_text("of a customer", encoding="utf-8")
    return folder


FILES = ["config.json", "model.safetensors", "onnx/model.onnx", "prune_recipe.lock.json"]


def test_a_bill_names_base_data_software_and_every_file(result: Path) -> None:
    bill = bill_of_materials(result, FILES)
    assert bill == bill_of_materials(result, FILES)
    model = bill["metadata"]["component"]
    assert model["pedigree"]["ancestors"][0]["name"] == "SmolLM2-135M.gguf"
    assert model["modelCard"]["modelParameters"]["architectureFamily"] == "llama"
    by_name = {one["name"]: one for one in bill["components"]}
    assert [name for name in by_name if by_name[name]["type"] == "file"] == FILES
    assert by_name["calibration"]["hashes"][0]["content"] == "cd" * 32
    (result / "model.safetensors").write_bytes(b"others")
    assert bill_of_materials(result, FILES)["serialNumber"] != bill["serialNumber"]


def test_a_bill_is_of_cyclonedx_schema(result: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema").SchemaVersion.V1_6
    text = write_bill(result, FILES).read_text(encoding="utf-8")
    found: Any = validation.JsonStrictValidator(schema).validate_str(text)
    assert found is None, found


def test_a_directory_without_a_base_is_refused(result: Path) -> None:
    (result / "prune_recipe.lock.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PublishError, match="does not say what"):
        bill_of_materials(result, FILES)


@pytest.mark.skipif(HAS_SIGNING, reason="model-signing is installed")
def test_what_is_missing_for_a_signature_is_said(result: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"prune-export\[sign\]"):
        sign(result, FILES, tmp_path / "key.pem")


@pytest.mark.skipif(not HAS_SIGNING, reason="the extra `sign` is not installed")
def test_the_signature_covers_what_is_published_and_nothing_else(
    result: Path, tmp_path: Path
) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    _make_keys(key, public)
    signature = sign(result, FILES, key)
    assert "private" not in signature.read_text(encoding="utf-8")

    def verified() -> bool:
        command = [sys.executable, "-m", "model_signing", "verify", "key", str(result),
                   "--signature", str(signature), "--public_key", str(public)]  # fmt: skip
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert not verified()  # what was not published is still there
    (result / "private notes.txt").unlink()
    assert verified()
    (result / "onnx" / "model.onnx").write_bytes(b"another")
    assert not verified()
    key.write_text("no key", encoding="utf-8")
    with pytest.raises(PublishError, match="openssl ecparam"):
        sign(result, FILES, key)


def _make_keys(key: Path, public: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(
        made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    public.write_bytes(
        made.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
